"""Calls that show whether an engine computes its graph: every shape of a flight, with values as a flight has them.

Every shape comes twice, with other values, because an engine replays a shape that comes back. Caches begin full of
stale numbers, and calls write behind entries of earlier calls or in between: an engine that attends to one entry too
many or too few gives other results.

Legend: B guidance rows, n tokens, D latent channels, T latent frames, h w rows and columns of a scale, M cache
capacity.
Source: runtime/worldvln/graphs.py (inputs of every graph); spec/world_model.md 6; optimisation_profiles (the shapes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from worldvln_edge.bundle import Bundle, GraphEntry, Manifest
from worldvln_edge.export.optimisation_profiles import ProfileError, graph_profiles
from worldvln_edge.runtime.engines.engine import OnnxEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.scale_tables import ScaleTables
from worldvln_edge.scale_schedule import ScaleStep

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]

NOISY_INPUTS = ("latents", "embeds", "codes", "features", "tokens", "frames", "images", "state_")
"""Inputs (or begins of their names) that are computed, so that rounding moves them; all others are given."""

_ROUNDS = 2
_EARLIER_SCALES = 3
_STREAM_NEXT = {
    graphs.first_or_next(stem, False): graphs.first_or_next(stem, True)
    for stem in (graphs.VAE_ENCODER, graphs.VAE_DECODER, graphs.VAE_PIXELS)
}


class NoParityCallsError(ValueError):
    """A graph that no flight is known to call. The message names it and the input."""


@dataclass(frozen=True, kw_only=True)
class ParityCall:
    """One call of a graph, without its caches."""

    shape: str
    """Of what varies: `scale (4, 8, 8)`."""
    inputs: Arrays
    tokens: int = 0
    """New cache entries; they begin at the input `write_index`."""

    @property
    def label(self) -> str:
        """For messages: the shape, and how much of the cache is valid."""
        return f"{self.shape}, cache {self.entries.stop}" if self.tokens else self.shape

    @property
    def rows(self) -> int:
        """Guidance rows of the call; 0 where a graph has no cache."""
        return len(self.inputs["write_index"]) if "write_index" in self.inputs else 0

    @property
    def entries(self) -> slice:
        """Cache entries that the call writes."""
        start = int(self.inputs["write_index"][0])
        return slice(start, start + self.tokens)


def plan_calls(bundle: Bundle, graph: str, seed: int = 0) -> list[ParityCall]:
    """Calls of one graph. The same bundle and seed give the same calls.

    Args:
        bundle: gives shapes, and the graph of the first call where the graph goes on from one.
        graph: see `runtime/worldvln/graphs.py`.
        seed: of the values.

    Raises:
        NoParityCallsError: a graph or an input that no flight has.
        EngineError: the graph of the first call does not load.
    """
    manifest = bundle.manifest
    entry, rng = manifest.graphs[graph], np.random.default_rng(seed)
    if graph == graphs.WORLD_MODEL_STEP:
        found = list(_step_inputs(manifest, rng))
    else:
        state = _first_state(bundle, graph, rng)
        found = []
        for _ in range(_ROUNDS):
            for shapes in _flight_shapes(graph, entry, manifest):
                inputs = {
                    name: state[name] if name in state else _value(name, s, entry, manifest, rng)
                    for name, s in shapes.items()
                }
                found.append((_label(entry, shapes), inputs))
    return _cached_calls(found, entry, manifest.guidance_rows, rng)


def new_caches(entry: GraphEntry, rows: int, seed: int = 0) -> Arrays:
    """Caches full of stale numbers: stem -> [B, heads, M, hd]."""
    rng = np.random.default_rng(seed)
    return {
        spec.name.removeprefix("past_"): rng.standard_normal(_fixed(spec.shape, rows), np.float32).astype(spec.dtype)
        for spec in entry.inputs
        if spec.name.startswith("past_")
    }


def _fixed(shape: tuple[int | str, ...], rows: int = 0) -> Shape:
    return tuple(rows if size == graphs.GUIDANCE_ROWS else int(size) for size in shape)


def _flight_shapes(graph: str, entry: GraphEntry, manifest: Manifest) -> list[dict[str, Shape]]:
    """Shapes of all inputs but caches and indices: every profile's smallest, best and largest, the largest first."""
    try:
        profiles = graph_profiles(graph, entry, manifest.model, rows=manifest.guidance_rows)
    except ProfileError as error:
        raise NoParityCallsError(str(error)) from error
    given = {s.name: s.shape for s in entry.inputs if not s.name.startswith(("past_", "write_index", "kv_length"))}
    fixed = {name: _fixed(shape) for name, shape in given.items() if all(isinstance(size, int) for size in shape)}
    found: list[dict[str, Shape]] = []
    for profile in profiles or ({},):
        for which in ("lowest", "best", "highest"):
            shapes = {name: fixed[name] if name in fixed else getattr(profile[name], which) for name in given}
            if shapes not in found:
                found.append(shapes)
    return sorted(found, key=lambda shapes: -sum(math.prod(shape) for shape in shapes.values()))


def _label(entry: GraphEntry, shapes: Mapping[str, Shape]) -> str:
    open_names = [s.name for s in entry.inputs if s.name in shapes and any(isinstance(size, str) for size in s.shape)]
    return ", ".join(f"{name} {shapes[name]}" for name in open_names[:1]) or "its only shape"


def _cached_calls(
    found: list[tuple[str, Arrays]], entry: GraphEntry, guidance_rows: int, rng: np.random.Generator
) -> list[ParityCall]:
    """Calls with their place in the cache: behind all that was written before, or with stale entries behind them.

    Steps of the later rounds run without guidance, with the instruction's row alone.
    """
    cache = next((spec for spec in entry.inputs if spec.name.startswith("past_")), None)
    if cache is None:
        return [ParityCall(shape=shape, inputs=inputs) for shape, inputs in found]
    _, _, capacity, _ = _fixed(cache.shape, guidance_rows)
    is_open = graphs.GUIDANCE_ROWS in cache.shape
    calls, written = [], 0
    for index, (shape, inputs) in enumerate(found):
        tokens = math.prod(inputs["rope"].shape[1:-1])
        last = min(written, capacity - tokens)
        is_first_round = index < len(found) // _ROUNDS
        start = last if is_first_round else int(rng.integers(0, last + 1))
        rows = guidance_rows if is_first_round or not is_open else 1
        if "embeds" in inputs:
            rows = len(inputs["embeds"])
        index_and_length = {
            "write_index": np.full(rows, start, np.int64),
            "kv_length": np.full(rows, start + tokens, np.int64),
        }
        written = max(written, start + tokens)
        calls.append(ParityCall(shape=shape, inputs=inputs | index_and_length, tokens=tokens))
    return calls


def _first_state(bundle: Bundle, graph: str, rng: np.random.Generator) -> Arrays:
    """What a streaming part goes on from: the state behind its first call."""
    first = _STREAM_NEXT.get(graph)
    if first is None or first not in bundle.manifest.graphs:
        return {}
    entry = bundle.manifest.graphs[first]
    (shapes,) = _flight_shapes(first, entry, bundle.manifest)
    inputs = {name: _value(name, shape, entry, bundle.manifest, rng) for name, shape in shapes.items()}
    outputs = OnnxEngine(bundle.graph_path(first)).run(inputs)
    return {name.removeprefix("next_"): a for name, a in outputs.items() if name.startswith("next_state_")}


def _step_inputs(manifest: Manifest, rng: np.random.Generator) -> Iterator[tuple[str, Arrays]]:
    """Every scale, the largest first: once with drawn bits, once with forced ones."""
    tables, config = ScaleTables(manifest.model), manifest.model.world_model
    steps = {step.thw: step for clip in tables.schedule.clips[1:] for step in clip.steps}
    for force in range(_ROUNDS):
        for step in sorted(steps.values(), key=lambda step: -step.tokens):
            t, h, w = step.thw
            codes = _codes(rng, (1, config.latent_channels, t, *manifest.model.schedule.latent_hw), axis=1)
            yield (
                f"scale {step.thw}",
                {
                    **tables.constants(step),
                    "codes": codes,
                    **_draws(rng, tables, step),
                    "force": np.float32(force).reshape(()),
                    "rope": tables.rope(step).reshape(2, t, h, w, -1),
                },
            )


def _draws(rng: np.random.Generator, tables: ScaleTables, step: ScaleStep) -> Arrays:
    own, shape = tables.bit_slice(step), (*step.thw, tables.joint_bits)
    arrays = {"uniforms": np.zeros(shape, np.float32), "forced_bits": np.zeros(shape, np.float32)}
    arrays["uniforms"][..., own] = rng.random(shape, np.float32)[..., own]
    arrays["forced_bits"][..., own] = rng.integers(0, 2, shape)[..., own]
    return arrays


def _codes(rng: np.random.Generator, shape: Shape, axis: int) -> np.ndarray:
    """Sums of codes of a few scales: every scale adds plus or minus one over the root of its bits."""
    signs = rng.integers(0, 2, (_EARLIER_SCALES, *shape)) * 2 - 1
    return (signs.sum(0) / math.sqrt(shape[axis])).astype(np.float32)


def _pictures(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Smooth moving pictures in [-1, 1]: [1, 3, F, h, w]."""
    _, channels, frames, height, width = shape
    phase = rng.uniform(0, 6, (channels, 1, 1, 1))
    speed = rng.uniform(0.1, 0.5, (channels, 1, 1, 1))
    t, rows, cols = np.ogrid[0:frames, 0:height, 0:width]
    waves = np.sin(rows * 0.4 + phase + speed * t) + np.cos(cols * 0.3 + phase)
    noise = rng.normal(0, 0.1, shape[1:])
    return np.clip(0.4 * waves + noise, -1, 1)[None].astype(np.float32)


def _rotations(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    angles = rng.uniform(0, 2 * np.pi, shape[1:])
    return np.stack([np.cos(angles), np.sin(angles)])


def _same_rows(values: np.ndarray) -> np.ndarray:
    """Both guidance rows see the same observation."""
    return np.repeat(values[:1], len(values), axis=0)


_Values = Callable[[np.random.Generator, Shape, Manifest], np.ndarray]
_VALUES: dict[str, _Values] = {
    "ids": lambda rng, shape, manifest: rng.integers(0, manifest.model.text_encoder.vocabulary, shape),
    "latents": lambda rng, shape, manifest: _same_rows(_codes(rng, shape, axis=2)),
    "codes": lambda rng, shape, manifest: _codes(rng, shape, axis=1),
    "frames": lambda rng, shape, manifest: _pictures(rng, shape),
    "rope": lambda rng, shape, manifest: _rotations(rng, shape),
    **dict.fromkeys(
        ("embeds", "features", "tokens", "images"), lambda rng, shape, manifest: rng.standard_normal(shape, np.float32)
    ),
}


def _value(name: str, shape: Shape, entry: GraphEntry, manifest: Manifest, rng: np.random.Generator) -> np.ndarray:
    if name not in _VALUES:
        raise NoParityCallsError(f"no flight is known to give input {name}; export the bundle again with this version")
    spec = next(spec for spec in entry.inputs if spec.name == name)
    return _VALUES[name](rng, shape, manifest).astype(spec.dtype)
