"""Graphs of a bundle on a GPU, one at a time, at the shapes of a flight's last segment, which has the longest context.

For widths whose graphs do not fit a machine together, and for random weights: every graph is loaded alone, its inputs
and caches lie on the device, and a call is timed until the device is done. Copies between host and device, and the
host's own work, are not in it; `worldvln-edge bench BUNDLE` measures those. Source: spec/world_model.md 9.3.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from worldvln_edge.action_windows import context_frame
from worldvln_edge.bundle import Bundle, Manifest
from worldvln_edge.runtime.bench.machine_peak import MachinePeak, matmul_run, measure_peak
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.scale_tables import ScaleTables
from worldvln_edge.world_model_flops import context_macs, step_macs

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TEXT_TOKENS = 32  # of a typical instruction
_QUERY = ("--query-gpu=name,memory.used,memory.total", "--format=csv,noheader")


class CallTime(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of one graph at one shape."""

    stage: str
    shape: str
    tokens: int
    """Of the world model; 0 for other graphs."""
    calls: int
    """In this segment."""
    call_ms: float
    """Median of the runs."""
    flops: float | None
    """FLOP per second; None for graphs whose FLOP are not counted here."""
    peak_share: float | None


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge bench BUNDLE --device cuda` prints."""

    model: str
    precision: str
    device: str
    """What nvidia-smi says: name, used and whole memory while the largest graph was loaded."""
    runner: str
    segment: int
    calls: list[CallTime]
    stages_ms: dict[str, float]
    segment_ms: float
    peak: MachinePeak


@dataclass(frozen=True, kw_only=True)
class _Call:
    graph: str
    shape: str
    calls: int
    inputs: Mapping[str, np.ndarray]
    cached: bool = False
    tokens: int = 0
    flops: int | None = None


def why_not_measurable(device: str = "cuda") -> str | None:
    """Why graphs cannot be timed on the device, in one sentence; None when they can."""
    provider = _PROVIDERS[device]
    if provider not in ort.get_available_providers():
        return (
            f"ONNX Runtime {ort.__version__} here has no {provider}; on a machine with an NVIDIA GPU run "
            "`make bench-gpu VENV=.venv-gpu EXTRAS=gpu,export`"
        )
    if device == "cuda" and _nvidia_smi() is None:
        return "no NVIDIA GPU answers here (nvidia-smi is missing or fails)"
    try:
        matmul_run(64, np.dtype(np.float16 if device == "cuda" else np.float32), threads=0, device=device)()
    except (EngineError, RuntimeError) as error:  # ONNX Runtime's own errors are RuntimeErrors here
        return f"{provider} does not start here ({' '.join(str(error).split())[:200]})"
    return None


def bench_device(
    bundle_folder: Path,
    *,
    device: str = "cuda",
    runs: int = 10,
    peak_size: int = 8192,
    on_call: Callable[[], None] = lambda: None,
) -> DeviceReport:
    """Time every graph call of a flight's last segment.

    Args:
        bundle_folder: what `worldvln-edge export` wrote; weights may be random.
        device: cuda; cpu is there to try the command.
        runs: of every call, after two that are not timed.
        peak_size: rows and columns of the largest product.
        on_call: called after every kind of call.

    Raises:
        BundleError: missing or corrupt bundle.
        EngineError: the device is not there, a graph does not load on it, or activations are bf16, which numpy lacks.
    """
    if (reason := why_not_measurable(device)) is not None:
        raise EngineError(reason)
    bundle = Bundle.open(bundle_folder)
    manifest = bundle.manifest
    if manifest.compute not in ("fp32", "fp16"):
        raise EngineError(
            f"{bundle_folder}: {manifest.compute} tensors cannot be made here; export with --compute fp16"
        )
    segment = manifest.model.horizon.segments - 1
    peak = measure_peak(size=peak_size, device=device)
    times: list[CallTime] = []
    session, loaded, state = None, "", _nvidia_smi() or device
    for call in _segment_calls(manifest, segment):
        if call.graph != loaded:
            session = None  # frees its weights before the next graph needs room
            session, loaded = _load(bundle.graph_path(call.graph), device), call.graph
        assert session is not None
        ms = _median_ms(_bound_run(session, manifest, call, device), runs)
        if call.graph == graphs.WORLD_MODEL_STEP:
            state = _nvidia_smi() or device
        rate = call.flops / (ms / 1e3) if call.flops is not None else None
        times.append(
            CallTime(
                stage=call.graph,
                shape=call.shape,
                tokens=call.tokens,
                calls=call.calls,
                call_ms=ms,
                flops=rate,
                peak_share=None if rate is None else rate / peak.matmul_flops,
            )
        )
        on_call()
    stages: dict[str, float] = {}
    for each in times:
        stages[each.stage] = stages.get(each.stage, 0.0) + each.calls * each.call_ms
    return DeviceReport(
        model=manifest.model.name,
        precision=manifest.precision,
        device=state,
        runner=f"onnxruntime {ort.__version__} {_PROVIDERS[device]}",
        segment=segment,
        calls=times,
        stages_ms=stages,
        segment_ms=sum(stages.values()),
        peak=peak,
    )


def _segment_calls(manifest: Manifest, segment: int) -> Iterator[_Call]:
    """Calls of the exact schedule, those of one graph behind each other."""
    config, rows = manifest.model, manifest.guidance_rows
    points, stride = config.horizon.points, config.video_vae.temporal_stride
    observed, following = points[segment], points[segment + 1]
    tables, draws = ScaleTables(config), np.random.default_rng(0)
    schedule, model = tables.schedule, config.world_model
    first, end = 1 + (observed - 1) // stride, 1 + (following - 1) // stride
    clips = [clip for clip in schedule.clips if first <= clip.first_frame < end]
    text = min(_TEXT_TOKENS, model.text_max_tokens)

    def past(clip: int, scale: int) -> int:
        keys = schedule.references_of_scale(clip, scale)
        return text + sum(schedule.last_step(*key).tokens for key in keys)

    def simple(graph: str, size: int, calls: int) -> _Call:
        inputs = {
            spec.name: draws.standard_normal(
                [dim if isinstance(dim, int) else size for dim in spec.shape], np.float32
            ).astype(spec.dtype)
            for spec in manifest.graphs[graph].inputs
        }
        return _Call(
            graph=graph, shape="x".join(map(str, next(iter(inputs.values())).shape)), calls=calls, inputs=inputs
        )

    def where(start: int, tokens: int) -> dict[str, np.ndarray]:
        return {
            name: np.full(rows, at, np.int64) for name, at in (("write_index", start), ("kv_length", start + tokens))
        }

    yield simple(graphs.first_or_next(graphs.VAE_ENCODER, False), following - observed, 1)
    for key in sorted({key for clip in clips for key in schedule.references(clip.index) if key[0] < clips[0].index}):
        step, start = schedule.last_step(*key), past(*key)
        embeds = draws.standard_normal((rows, step.tokens, model.width), np.float32)
        yield _Call(
            graph=graphs.WORLD_MODEL_CONTEXT,
            shape=f"{step.thw[1]}x{step.thw[2]}",
            calls=1,
            inputs={"embeds": embeds, "rope": tables.rope(step), **where(start, step.tokens)},
            cached=True,
            tokens=step.tokens,
            flops=context_macs(model, rows=rows, tokens=step.tokens, visible=start + step.tokens).flops,
        )
    kinds: dict[tuple, int] = {}
    for clip in clips:
        for step in clip.steps:
            kinds[(step.thw, step.scale)] = kinds.get((step.thw, step.scale), 0) + 1
    last = {(step.thw, step.scale): step for clip in clips for step in clip.steps}
    for kind, count in kinds.items():
        step = last[kind]
        start = past(step.clip, step.scale)
        clip = schedule.clips[step.clip]
        nothing = tables.no_bits(step)
        yield _Call(
            graph=graphs.WORLD_MODEL_STEP,
            shape=f"{step.thw[1]}x{step.thw[2]}",
            calls=count,
            inputs={
                **tables.constants(step),
                "codes": draws.standard_normal(tables.no_codes(clip).shape, np.float32),
                "uniforms": draws.random(nothing.shape, np.float32),
                "forced_bits": nothing,
                "force": np.zeros((), np.float32),
                "rope": tables.rope(step).reshape(2, *step.thw, -1),
                **where(start, step.tokens),
            },
            cached=True,
            tokens=step.tokens,
            flops=step_macs(config, rows=rows, thw=step.thw, visible=start + step.tokens).flops,
        )
    # What was observed since the segment before, and what is predicted.
    yield simple(graphs.first_or_next(graphs.VAE_DECODER, False), end - first, 2)
    yield simple(graphs.ACTION_ADAPTER, following - observed, 1)
    frames = following - context_frame(observed, config.action_decoder.left_context) + 1
    yield simple(graphs.ACTION_HEAD, frames, 1)


def _load(path: Path, device: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=[_PROVIDERS[device]])
    except Exception as error:  # ONNX Runtime's error classes share no other base
        raise EngineError(f"{path}: ONNX Runtime {ort.__version__} cannot load it on {device} ({error})") from error
    if session.get_providers()[0] != _PROVIDERS[device]:
        raise EngineError(f"{path}: ONNX Runtime took {session.get_providers()[0]} instead of {_PROVIDERS[device]}")
    return session


def _bound_run(session: ort.InferenceSession, manifest: Manifest, call: _Call, device: str) -> Callable[[], None]:
    """A call with everything on the device; caches are written in place."""
    binding = session.io_binding()
    types = {spec.name: np.dtype(spec.dtype) for spec in manifest.graphs[call.graph].inputs}
    for name, array in call.inputs.items():
        value = np.asarray(array.astype(types[name]), order="C")
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
    if call.cached:
        model, rows = manifest.model.world_model, manifest.guidance_rows
        shape = (rows, model.kv_heads, manifest.kv_capacity, model.head_dim)
        for stem in graphs.cache_stems(model.depth):
            # Not zeros: their attention would be as fast, but their scores would not be those of a flight.
            cache = np.random.default_rng(1).standard_normal(shape, np.float32).astype(types[f"past_{stem}"])
            value = ort.OrtValue.ortvalue_from_numpy(cache, device, 0)
            binding.bind_ortvalue_input(f"past_{stem}", value)
            binding.bind_ortvalue_output(f"present_{stem}", value)
    for output in session.get_outputs():
        if not output.name.startswith("present_"):
            binding.bind_output(output.name, device, 0)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _median_ms(run: Callable[[], None], runs: int) -> float:
    for _ in range(2):
        run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


def _nvidia_smi() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", *_QUERY], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
