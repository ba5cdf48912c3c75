"""Does an engine compute its graph? The engine and ONNX Runtime run the same calls, and their results are compared.

| output               | measures                                            | bound                             |
|----------------------|-----------------------------------------------------|-----------------------------------|
| of other graphs      | relative_max, relative_rms                          | `FLOORS` + `NOISE_FACTOR` * noise |
| new entries of cache | the same, over all layers                           | the same                          |
| probabilities        | max_abs, mean_abs                                   | the same                          |
| next_codes           | max_abs, with forced bits                           | `_CODES`                          |
| bits                 | share that the engine's own probabilities contradict | 0                                 |

The noise is what rounding does to this graph on these calls, measured without the engine: ONNX Runtime once more,
without fusing operators, and with computed inputs and the results moved by half a unit in the last place of the compute
dtype. So the bounds know the number format, the depth and the weights, and one wrong weight does not hide behind the
cost of int4.
Engine and reference each keep their own cache, as in a flight.

Source: `parity_calls` (the calls); `parity_bounds` (the measures).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from worldvln_edge.bundle import Bundle, EngineEntry, GraphEntry
from worldvln_edge.export.parity_bounds import Differences
from worldvln_edge.export.parity_calls import NOISY_INPUTS, Arrays, ParityCall, new_caches, plan_calls
from worldvln_edge.parity_record import EngineParity, OutputParity
from worldvln_edge.runtime.engines.device_memory import DeviceMemory, DeviceMemoryError
from worldvln_edge.runtime.engines.engine import Engine, EngineError, OnnxEngine
from worldvln_edge.runtime.engines.engine_signature import EngineShapeError
from worldvln_edge.runtime.engines.tensorrt_engine import TensorRTEngine

CACHE = "kv_cache"
"""All new entries of a call, in the table of outputs."""
_CODES = 1e-6  # summed in float32 from the same bits, whatever the precision
NOISE_FACTOR = 4.0
"""Graphs of the shipped model in fp16 lie within 1.4 times their noise when they are computed in fp32 instead; the
rest is for GPUs, which sum in another order."""
FLOORS = {"relative_max": 5e-6, "relative_rms": 1e-6, "max_abs": 1e-5, "mean_abs": 2e-7}
"""What every bound is at least: rounding to float32 of results whose noise happens to be zero."""
_TIE = 1e-6  # a bit may go either way where its uniform number is this close to its probability
_UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11}
"""Half a unit in the last place of the compute dtype, relative."""
_COARSE_ACTIVATIONS = {"int8": 2.0**-16, "fp8": 2.0**-16}
"""Least unit where activations are rounded to eight bits: they tip over at the slightest difference, but seldom, and
with the unit of fp32 the noise would depend on whether one happened to. The noise of int8 is wide: a wrong row of a
head lies below it, one of an embedding above; in fp16 and int4 both are found."""
_WITHOUT_ROUNDING = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Left alone, ONNX Runtime rounds the activations in front of int4 weights to int8, which no engine does."""

Measures = dict[tuple[str, str], float]
"""(output, measure) -> value of one call."""


def engine_parity(bundle: Bundle, entry: EngineEntry, memory: DeviceMemory, *, seed: int = 0) -> EngineParity:
    """Run an engine and its graph on the same calls.

    One side is in memory at a time. The reference is ONNX Runtime on the CPU: a graph of 8 billion weights takes it
    minutes a call.

    Args:
        bundle: of the engine.
        entry: the engine; it fits `memory` and the installed package.
        memory: the device.
        seed: of the calls' values.

    Returns:
        The comparison. An engine that does not load or run is not `within`, and `failure` says why.

    Raises:
        NoParityCallsError: no flight is known to call this graph.
        EngineError: ONNX Runtime does not load the graph.
        BundleError: the engine's file is missing or corrupt.
    """
    graph, path = bundle.manifest.graphs[entry.graph], bundle.graph_path(entry.graph)
    data = bundle.engine_path(entry).read_bytes()
    calls = plan_calls(bundle, entry.graph, seed)
    reference = OnnxEngine(path, settings=_WITHOUT_ROUNDING)
    runner = reference.runner
    expected = run_calls(reference, graph, calls)
    del reference
    other_way = run_with_noise(OnnxEngine(path, optimise=False), graph, calls, rounding_unit(bundle, entry.graph), seed)
    try:
        engine = TensorRTEngine(data, graph=entry.graph, package=entry.backend, memory=memory)
        try:
            found = run_calls(engine, graph, calls)
        finally:
            engine.close()
    except (EngineError, EngineShapeError, DeviceMemoryError) as error:
        return EngineParity(within=False, reference=runner, shapes=0, failure=str(error))
    return compare(calls, found, expected, other_way, runner)


def run_calls(engine: Engine, graph: GraphEntry, calls: Sequence[ParityCall]) -> list[Arrays]:
    """Results of every call, with the new entries of all caches as `kv_cache`: [caches, B, heads, n, hd]."""
    caches, results = new_caches(graph, max(call.rows for call in calls)), []
    for call in calls:
        seen = {stem: cache[: call.rows] for stem, cache in caches.items()}
        outputs = dict(engine.run(call.inputs, seen) if seen else engine.run(call.inputs))
        if seen:
            outputs[CACHE] = np.stack([cache[:, :, call.entries].copy() for cache in seen.values()])
        results.append(outputs)
    return results


def rounding_unit(bundle: Bundle, graph: str) -> float:
    """How far rounding moves a number of this graph, relative to itself."""
    least = _COARSE_ACTIVATIONS.get(bundle.manifest.graphs[graph].precision, 0.0)
    return max(least, _UNIT[bundle.manifest.compute])


def run_with_noise(
    engine: Engine, graph: GraphEntry, calls: Iterable[ParityCall], unit: float, seed: int = 0
) -> list[Arrays]:
    """As `run_calls`, with computed inputs and all results moved by a random part of `unit`, relative to themselves."""
    rng = np.random.default_rng((seed, 1))

    def move(array: np.ndarray) -> np.ndarray:
        return (array * (1 + unit * rng.uniform(-1, 1, array.shape))).astype(array.dtype)

    moved = [
        ParityCall(
            shape=call.shape,
            inputs={name: move(a) if name.startswith(NOISY_INPUTS) else a for name, a in call.inputs.items()},
            tokens=call.tokens,
        )
        for call in calls
    ]
    # The results too: a graph of token ids has no input that rounding moves.
    return [{name: move(array) for name, array in outputs.items()} for outputs in run_calls(engine, graph, moved)]


def compare(
    calls: Sequence[ParityCall],
    found: Sequence[Arrays],
    expected: Sequence[Arrays],
    other_way: Sequence[Arrays],
    reference: str,
) -> EngineParity:
    """The worst of every measure over all calls, with its bound.

    Args:
        calls: what was run.
        found: by the engine.
        expected: by the reference.
        other_way: by the reference, with noise.
        reference: its name.
    """
    noise: Measures = {}
    for call, way, reference_outputs in zip(calls, other_way, expected, strict=True):
        for key, value in _measures(call, way, reference_outputs).items():
            noise[key] = max(noise.get(key, 0.0), value)
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for call, outputs, reference_outputs in zip(calls, found, expected, strict=True):
        for key, value in _measures(call, outputs, reference_outputs).items():
            if key not in worst or value > worst[key][0]:
                worst[key] = (value, call.label)
    rows = tuple(_row(key, value, shape, _bound(key, noise[key])) for key, (value, shape) in sorted(worst.items()))
    return EngineParity(
        within=all(row.within for row in rows),
        reference=reference,
        shapes=len({call.shape for call in calls}),
        outputs=rows,
    )


def _row(key: tuple[str, str], error: float, shape: str, bound: float) -> OutputParity:
    return OutputParity(
        output=key[0],
        measure=key[1],
        error=error if np.isfinite(error) else None,
        bound=bound,
        within=bool(error <= bound),
        shape=shape,
    )


def _bound(key: tuple[str, str], noise: float) -> float:
    output, measure = key
    if output == "bits":
        return 0.0
    if output == "next_codes":
        return _CODES
    return FLOORS[measure] + NOISE_FACTOR * noise


def _measures(call: ParityCall, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Measures:
    """What is measured of one call; a NaN or another shape is an infinite difference."""
    values: Measures = {}
    is_forced = bool(call.inputs.get("force", np.float32(0)))
    for name, right in expected.items():
        if name == "bits" and not is_forced:
            values[name, "wrong"] = _wrong_bits(call, found)
        elif name == "bits" or (name == "next_codes" and not is_forced):
            continue  # forced bits are in next_codes; drawn ones differ where probabilities do
        elif found[name].shape != right.shape:
            values[name, "max_abs"] = np.inf
        elif name == "next_codes":
            values[name, "max_abs"] = _differences(found[name], right).max_abs
        elif name == "probabilities":
            differences = _differences(found[name], right)
            values[name, "max_abs"], values[name, "mean_abs"] = differences.max_abs, differences.mean_abs
        else:
            measured = _differences(found[name], right).values()
            for measure in ("relative_max", "relative_rms"):
                values[name, measure] = measured[measure]
    return values


def _differences(found: np.ndarray, expected: np.ndarray) -> Differences:
    differences = Differences()
    differences.add(found, expected)
    return differences


def _wrong_bits(call: ParityCall, outputs: Mapping[str, np.ndarray]) -> float:
    """Share of drawn bits that do not follow from the probabilities beside them."""
    uniforms, probabilities = call.inputs["uniforms"], outputs["probabilities"]
    is_tie = np.abs(uniforms - probabilities) <= _TIE
    return float(np.mean(((uniforms < probabilities) != (outputs["bits"] > 0.5)) & ~is_tie))
