"""Optimisation profiles: the shapes that a flight gives to every graph, as TensorRT wants them.

Every number comes from the bundle's configuration: the scale schedule says which (T, h, w) a step has and how many
tokens an observed scale adds, the horizon how many frames a segment holds. Nothing outside the flight is covered, so an
engine refuses a shape that no flight has.

Two styles. `exact` makes one profile per distinct shape, with min = opt = max: every shape gets kernels tuned for it,
and nothing else is accepted. `range` makes one profile that spans them all, tuned for the largest: a quarter of the
build time and of the file, for an engine that specialises shapes when it runs. Lengths that a flight takes any value of
(text tokens, frames that arrive together) are ranges in both.

The first frame of a flight is always observed, never generated, so steps have the shapes of the later clips only.

Legend: B guidance rows, n tokens of a step = T*h*w, C width, D latent channels, T latent frames, H W latent rows and
columns, F frames.
Source: spec/world_model.md 3, 6, 9.2; spec/video_vae.md 8; spec/action_decoder.md 4; runtime/worldvln/graphs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from worldvln_edge.bundle import GraphEntry
from worldvln_edge.config import ModelConfig
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.scale_schedule import ScaleSchedule

Shape = tuple[int, ...]
Style = Literal["exact", "range"]


class ProfileError(ValueError):
    """Shapes that do not fit a graph. The message names the graph and the input."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Shapes of one input: at least, best at, at most."""

    lowest: Shape
    best: Shape
    highest: Shape

    @classmethod
    def fixed(cls, shape: Shape) -> Span:
        return cls(lowest=shape, best=shape, highest=shape)

    @property
    def is_fixed(self) -> bool:
        return self.lowest == self.highest


Profile = dict[str, Span]
"""Input name -> shapes. Inputs whose shape is fixed in the graph are left out."""


def graph_profiles(
    graph: str, entry: GraphEntry, config: ModelConfig, *, rows: int, style: Style = "exact"
) -> tuple[Profile, ...]:
    """Profiles of one graph; none for a graph whose inputs all have fixed shapes.

    Args:
        graph: name, see `runtime/worldvln/graphs.py`.
        entry: what the manifest says about it.
        config: of the bundle.
        rows: guidance rows B of the bundle.
        style: see the top of this file.

    Raises:
        ProfileError: a graph with open dimensions that no flight is known to run, or a shape that its inputs refuse.
    """
    dynamic = {spec.name: spec.shape for spec in entry.inputs if any(isinstance(size, str) for size in spec.shape)}
    if not dynamic:
        return ()
    if graph not in _SHAPES:
        raise ProfileError(
            f"graph {graph} has open dimensions ({', '.join(sorted(dynamic))}) and no flight shapes are known for it; "
            "leave it out with --graphs, or export the bundle again with this version"
        )
    # Caches and indices are open in the guidance rows alone: with all of them, or with the instruction's.
    per_row = {
        name: Span(lowest=_with_rows(shape, 1), best=_with_rows(shape, rows), highest=_with_rows(shape, rows))
        for name, shape in dynamic.items()
        if {size for size in shape if isinstance(size, str)} == {graphs.GUIDANCE_ROWS}
    }
    profiles: list[Profile] = []
    for shapes in _SHAPES[graph](_Flight(config, rows)):
        shapes = {**per_row, **shapes}
        missing = sorted(dynamic.keys() - shapes.keys())
        if missing:
            raise ProfileError(f"graph {graph}: no flight shapes are known for input {missing[0]}; export it again")
        profile = {name: shapes[name] for name in dynamic}
        for name, span in profile.items():
            _check(graph, name, dynamic[name], span)
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles) if style == "exact" else (_hull(profiles),)


def _with_rows(shape: tuple[int | str, ...], rows: int) -> Shape:
    return tuple(rows if isinstance(size, str) else size for size in shape)


def _check(graph: str, name: str, declared: tuple[int | str, ...], span: Span) -> None:
    for shape in (span.lowest, span.best, span.highest):
        fits = len(shape) == len(declared) and all(
            isinstance(size, str) or size == found for size, found in zip(declared, shape, strict=False)
        )
        if not fits:
            raise ProfileError(
                f"graph {graph}: a flight gives {name} the shape {shape}, the graph takes {declared}; "
                "export the bundle again"
            )


def _hull(profiles: list[Profile]) -> Profile:
    def each(name: str, pick: Callable[[list[Shape]], Shape], which: str) -> Shape:
        return pick([getattr(profile[name], which) for profile in profiles])

    def smallest(shapes: list[Shape]) -> Shape:
        return tuple(min(sizes) for sizes in zip(*shapes, strict=True))

    def largest(shapes: list[Shape]) -> Shape:
        return tuple(max(sizes) for sizes in zip(*shapes, strict=True))

    return {
        name: Span(
            lowest=each(name, smallest, "lowest"),
            best=each(name, largest, "best"),
            highest=each(name, largest, "highest"),
        )
        for name in profiles[0]
    }


class _Flight:
    """The sizes of one configuration's flights."""

    def __init__(self, config: ModelConfig, rows: int):
        self.config = config
        self.rows = rows
        self.stride = config.video_vae.temporal_stride
        self.schedule = ScaleSchedule(config.schedule, 1 + (config.horizon.num_frames - 1) // self.stride)

    def step_sizes(self) -> list[tuple[int, int, int]]:
        """(T, h, w) of the generated steps, in the order of the schedule."""
        sizes = dict.fromkeys(step.thw for clip in self.schedule.clips[1:] for step in clip.steps)
        return sorted(sizes, key=math.prod)

    def observed_tokens(self) -> list[int]:
        """Tokens of the observed scales that later clips refer to."""
        tokens = {
            self.schedule.last_step(clip.index, scale).tokens
            for clip in self.schedule.clips
            for scale in self.schedule.scales_referred_to(clip.index)
        }
        return sorted(tokens)

    def segment_latents(self) -> int:
        """Latent frames of a segment."""
        return self.config.horizon.step // self.stride

    def adapter_frames(self) -> list[int]:
        """Frames of one adapter call: observed latent frames that hold context, or a predicted segment."""
        context = -(-self.config.action_decoder.left_context // self.stride)
        observed = {1} | {count * self.stride for count in range(1, context + 1)}
        return sorted(observed | {self.config.horizon.step})

    def head_frames(self) -> list[int]:
        """Frames of one action head call: the observed context and the segment."""
        horizon, left = self.config.horizon, self.config.action_decoder.left_context
        return sorted({min(left, point) + horizon.step for point in horizon.points[:-1]})

    def per_row(self, *shape: int) -> Span:
        """A shape for every number of guidance rows, best with all of them."""
        return Span(lowest=(1, *shape), best=(self.rows, *shape), highest=(self.rows, *shape))

    def open_length(self, best: int, highest: int) -> tuple[int, int, int]:
        return 1, min(best, highest), highest


def _ranged(lengths: tuple[int, int, int], **shape_of: Callable[[int], Shape]) -> Profile:
    lowest, best, highest = lengths
    return {
        name: Span(lowest=shape(lowest), best=shape(best), highest=shape(highest)) for name, shape in shape_of.items()
    }


def _text_encoder(flight: _Flight) -> Iterator[Profile]:
    most = flight.config.world_model.text_max_tokens
    yield _ranged(flight.open_length(most // 4, most), ids=lambda n: (1, n))


def _latent_embed(flight: _Flight) -> Iterator[Profile]:
    for tokens in flight.observed_tokens():
        yield {"latents": flight.per_row(tokens, flight.config.world_model.latent_channels)}


def _context(flight: _Flight) -> Iterator[Profile]:
    model = flight.config.world_model
    lengths = [(tokens, tokens, tokens) for tokens in flight.observed_tokens()]
    for lowest, best, highest in (*lengths, flight.open_length(model.text_max_tokens // 4, model.text_max_tokens)):
        yield {
            "embeds": Span(
                lowest=(1, lowest, model.width),
                best=(flight.rows, best, model.width),
                highest=(flight.rows, highest, model.width),
            ),
            **_ranged((lowest, best, highest), rope=lambda n: (2, n, model.head_dim // 2)),
        }


def _step(flight: _Flight) -> Iterator[Profile]:
    model = flight.config.world_model
    (rows, cols), bits = flight.config.schedule.latent_hw, model.semantic_bits + model.detail_bits
    for t, h, w in flight.step_sizes():
        yield {
            "codes": Span.fixed((1, model.latent_channels, t, rows, cols)),
            "area_h": Span.fixed((h, rows)),
            "area_w": Span.fixed((w, cols)),
            "up_h": Span.fixed((rows, h)),
            "up_w": Span.fixed((cols, w)),
            "uniforms": Span.fixed((t, h, w, bits)),
            "forced_bits": Span.fixed((t, h, w, bits)),
            "rope": Span.fixed((2, t, h, w, model.head_dim // 2)),
        }


def _vae_encoder(flight: _Flight) -> Iterator[Profile]:
    # Frames come as the drone sends them: any number of whole groups, up to all that a horizon encodes.
    groups = max(1, (flight.config.horizon.points[-2] - 1) // flight.stride)
    clip = flight.segment_latents()
    height, width = flight.config.image_hw

    def shape(groups: int) -> Shape:
        return (1, 3, groups * flight.stride, height, width)

    for lengths in ((min(clip, groups),) * 3, flight.open_length(clip, groups)):
        yield _ranged(lengths, frames=shape)


def _vae_decoder(flight: _Flight) -> Iterator[Profile]:
    # A predicted segment at once; observed latent frames as they come, one by one where frames do.
    rows, cols = flight.config.schedule.latent_hw
    segment = flight.segment_latents()
    for lengths in ((segment,) * 3, flight.open_length(1, segment)):
        yield _ranged(lengths, codes=lambda n: (1, flight.config.video_vae.raw_channels, n, rows, cols))


def _vae_pixels(flight: _Flight) -> Iterator[Profile]:
    vae, (height, width) = flight.config.video_vae, flight.config.image_hw
    rows, cols = flight.config.schedule.latent_hw
    for latents in sorted({clip.frames for clip in flight.schedule.clips[1:]} | {flight.segment_latents()}):
        frames, grid = latents * flight.stride, (height // vae.pixel_patch, width // vae.pixel_patch)
        yield {
            "features": Span.fixed((1, vae.feature_channels, frames, *grid)),
            "codes": Span.fixed((1, vae.raw_channels, latents, rows, cols)),
        }


def _action_adapter(flight: _Flight) -> Iterator[Profile]:
    vae, (height, width) = flight.config.video_vae, flight.config.image_hw
    for frames in flight.adapter_frames():
        shape = (1, vae.feature_channels, frames, height // vae.pixel_patch, width // vae.pixel_patch)
        yield {"features": Span.fixed(shape)}


def _action_head(flight: _Flight) -> Iterator[Profile]:
    head = flight.config.action_decoder.latent_head
    for frames in flight.head_frames():
        yield {"tokens": Span.fixed((frames, head.tokens_per_frame, head.width))}


def _rgb_head(flight: _Flight) -> Iterator[Profile]:
    for frames in flight.head_frames():
        yield {"images": Span.fixed((frames, 3, *flight.config.action_decoder.rgb_head.image_hw))}


_SHAPES: dict[str, Callable[[_Flight], Iterator[Profile]]] = {
    graphs.TEXT_ENCODER: _text_encoder,
    graphs.LATENT_EMBED: _latent_embed,
    graphs.WORLD_MODEL_CONTEXT: _context,
    graphs.WORLD_MODEL_STEP: _step,
    graphs.first_or_next(graphs.VAE_ENCODER, False): _vae_encoder,
    graphs.first_or_next(graphs.VAE_DECODER, False): _vae_decoder,
    graphs.first_or_next(graphs.VAE_PIXELS, False): _vae_pixels,
    graphs.ACTION_ADAPTER: _action_adapter,
    graphs.ACTION_HEAD: _action_head,
    graphs.RGB_HEAD: _rgb_head,
}
