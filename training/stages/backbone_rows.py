"""What the backbone reads: flights with cached latents, and what is drawn for a row in an epoch.

Legend: C latent channels, T latent frames of a flight, h w latent grid.
Source: spec/training.md 1.3 (caption), 1.4 (latents), 2.2 (repetitions, flips), 2.3 (condition drop), 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from worldvln_edge.models.attention_mask import ScaleKey, all_scales, visual_tokens
from worldvln_edge.models.quantizer import SelfCorrection
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.partial_scales import draw_scales
from worldvln_edge.training.trainer.stage import row_generator


class BackboneDataError(ValueError):
    """A row that the backbone cannot train on; the message names it."""


class LatentFlights(Protocol):
    """Flights whose raw VAE features are at hand."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """File and row, for messages."""

    def latent_frames(self, row: int) -> int:
        """T, without reading."""

    def latents(self, row: int) -> Tensor:
        """float32 [C, T, h, w] on the CPU, before quantisation."""

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        """Without the duration tag; with a generator, drawn where a row offers a choice."""


class CachedFlights:
    """Flights of a source, with latents from a cache.

    Args:
        source: frames are not read.
        read: row -> latents [C, T, h, w]; called in worker processes.
        temporal_stride: frames of a latent frame.
    """

    def __init__(self, source: FlightSource, read: Callable[[int], Tensor], temporal_stride: int):
        self._source, self._read, self._stride = source, read, temporal_stride

    def __len__(self) -> int:
        return len(self._source)

    def name(self, row: int) -> str:
        return self._source.name(row)

    def latent_frames(self, row: int) -> int:
        return (self._source.frame_count(row) - 1) // self._stride + 1

    def latents(self, row: int) -> Tensor:
        return self._read(row)

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._source.instruction(row, generator)


class LatentSet:
    """Flights of one length in memory.

    Args:
        latents_NCTHW: float32, on the CPU.
        instructions: one per flight.
    """

    def __init__(self, latents_NCTHW: Tensor, instructions: Sequence[str]):
        if len(latents_NCTHW) != len(instructions):
            raise BackboneDataError(f"{len(latents_NCTHW)} flights have {len(instructions)} instructions")
        self._latents, self._instructions = latents_NCTHW, tuple(instructions)

    def __len__(self) -> int:
        return len(self._instructions)

    def name(self, row: int) -> str:
        return f"flight {row}"

    def latent_frames(self, row: int) -> int:
        return self._latents.shape[2]

    def latents(self, row: int) -> Tensor:
        return self._latents[row]

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._instructions[row]


@dataclass(frozen=True, kw_only=True)
class RowDraws:
    """Everything random about a row in an epoch."""

    instruction: str
    is_unconditional: bool
    scales: tuple[ScaleKey, ...]
    corruption: SelfCorrection


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How training rows differ from what is served."""

    flip_strength: float | Sequence[float]
    condition_drop: float
    partial_scales: Mapping[str, float]
    longest_row: int | None
    """Rows of more visual tokens train on one part of their scales; None: every row trains whole."""


def draw_row(
    flights: LatentFlights, row: int, schedule: ScaleSchedule, corruption: Corruption, *, seed: int, epoch: int
) -> RowDraws:
    """The draws of a training row, in an order that is always the same."""
    generator = row_generator(seed, epoch, row)
    # Of its own, so that flips do not depend on how many numbers a caption or a part of the schedule takes.
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    instruction = flights.instruction(row, generator)
    is_unconditional = float(torch.rand((), generator=generator)) < corruption.condition_drop
    scales = tuple(all_scales(schedule))
    if corruption.longest_row is not None and visual_tokens(schedule) > corruption.longest_row:
        scales = draw_scales(schedule, corruption.partial_scales, generator)
    return RowDraws(
        instruction=instruction,
        is_unconditional=is_unconditional,
        scales=scales,
        corruption=SelfCorrection(schedule, corruption.flip_strength, own),
    )


def served_row(flights: LatentFlights, row: int, schedule: ScaleSchedule) -> RowDraws:
    """A row as it is served: nothing flipped or dropped, the last repetitions, the first caption (2.9)."""
    return RowDraws(
        instruction=flights.instruction(row),
        is_unconditional=False,
        scales=tuple(all_scales(schedule)),
        corruption=SelfCorrection(schedule, 0.0, torch.Generator(), last_repetition=True),
    )


class RowsCorruption:
    """Corruption of rows that are encoded together; every row draws from its own generator."""

    def __init__(self, rows: Sequence[SelfCorrection]):
        self._rows = rows

    def flips(self, step: ScaleStep, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """See `quantizer.BitFlips`."""
        flips = [row.flips(step, (1, *shape[1:]), device) for row in self._rows]
        drawn = [flip for flip in flips if flip is not None]
        # Rows of one schedule and one strength draw at the same steps.
        return torch.cat(drawn) if drawn else None

    def repetition(self, clip: int, scale: int, count: int, batch: int) -> Tensor:
        """See `quantizer.BitFlips`."""
        return torch.cat([row.repetition(clip, scale, count, 1) for row in self._rows])
