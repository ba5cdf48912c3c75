"""Free flights: the bundle draws its own bits from the same uniform numbers as PyTorch.

A bit may only flip at a tie: its uniform number lies so close to its probability that rounding decides. How close is
the bound of the probabilities themselves (row `world_model`). Everything drawn after the first flip may differ, so
actions are compared where all bits of a segment are equal.
Source: spec/world_model.md 6, 9.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from worldvln_edge.export.forced_flight import probabilities, records_of
from worldvln_edge.export.parity_bounds import (
    ParityRow,
    StageBounds,
    VerifyError,
    action_difference,
    action_values,
)
from worldvln_edge.export.torch_flight import TorchSegment
from worldvln_edge.models.generation import StepRecord
from worldvln_edge.noise import step_uniforms
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy


@dataclass(frozen=True, kw_only=True)
class FlownSegment:
    """What a session of the bundle did in one segment."""

    observed: tuple[tuple[np.ndarray, ...], ...]
    """Bits of every observed clip, step by step."""
    drawn: tuple[tuple[np.ndarray, ...], ...]
    actions: np.ndarray
    """[N, 6], cm and deg."""


def fly_freely(
    policy: WorldVLNPolicy, instruction: str, video: list[np.ndarray], seed: int, segments: int
) -> list[FlownSegment]:
    """Fly as a session does, frame by frame.

    Args:
        policy: of the bundle.
        instruction: without tags.
        video: uint8 RGB frames.
        seed: of the draws.
        segments: how many.

    Raises:
        VerifyError: a segment without actions.
    """
    session, sent, flown = policy.new_session(instruction, seed=seed, record=True), 0, []
    for index in range(segments):
        end = policy.config.horizon.points[index]
        chunk = session.observe(video[sent:end])
        sent = end
        if chunk is None:
            raise VerifyError(f"the bundle gave no actions for segment {index}")
        flown.append(
            FlownSegment(
                observed=tuple(clip.bits for clip in session.observed_clips),
                drawn=tuple(clip.bits for clip in session.last_prediction),
                actions=chunk.actions,
            )
        )
    return flown


@dataclass
class BitShares:
    """How many bits are equal, observed and drawn ones apart."""

    observed_equal: int = 0
    observed: int = 0
    drawn_equal: int = 0
    drawn: int = 0

    def values(self) -> dict[str, float]:
        """Shares; none of what was not seen."""
        counts = {
            "observed_bits_equal": (self.observed_equal, self.observed),
            "drawn_bits_equal": (self.drawn_equal, self.drawn),
        }
        return {name: equal / total for name, (equal, total) in counts.items() if total}

    def compare(self, flown: FlownSegment, segment: TorchSegment) -> Iterator[tuple[bool, StepRecord, np.ndarray]]:
        """Count one segment. Yields (is it drawn, its record, which bits are equal) of every step."""
        for index, bits in enumerate((*flown.observed, *flown.drawn)):
            is_drawn = index >= len(flown.observed)
            for found, record in zip(bits, records_of(segment, index), strict=True):
                same = found == record.bits_BThwd[0].numpy()
                if is_drawn:
                    self.drawn_equal, self.drawn = self.drawn_equal + int(same.sum()), self.drawn + same.size
                else:
                    self.observed_equal, self.observed = (
                        self.observed_equal + int(same.sum()),
                        self.observed + same.size,
                    )
                yield is_drawn, record, same


class FlightParity:
    """Sums over flights.

    Args:
        must_agree: segments without a flip have to exist. So it is in fp32, where ties are rare.
    """

    def __init__(self, *, must_agree: bool):
        self.must_agree = must_agree
        self.bits = BitShares()
        self.margin: float | None = None
        self.actions: list[np.ndarray] = []
        self.segments = 0

    def add(self, flown: Sequence[FlownSegment], segments: Sequence[TorchSegment], seed: int) -> None:
        """One flight of the bundle, and PyTorch's with the bundle's weights and the same seed."""
        for own, segment in zip(flown, segments, strict=True):
            self.segments += 1
            flips, margin = False, 0.0
            for is_drawn, record, same in self.bits.compare(own, segment):
                if not same.all() and not flips:
                    flips, margin = True, _margin(record, same, seed) if is_drawn else 0.0
            if flips:
                self.margin = max(self.margin or 0.0, margin)
            else:
                self.actions.append(action_difference(own.actions, segment.actions))

    def row(self, bounds: StageBounds) -> ParityRow:
        """The row `flight`."""
        values, failures, note = self.bits.values(), [], ""
        values["segments_without_flip"] = float(len(self.actions))
        if self.actions:
            values |= action_values(self.actions)
        elif self.must_agree:
            failures.append("no segment had equal bits, so no actions were compared; try another --seed")
        if self.margin is not None:
            values["first_flip_margin"] = self.margin
            note = f"{len(self.actions)} of {self.segments} segments without a flip, ties at {self.margin:.1e}"
        return ParityRow("flight", values, failures + bounds.failures(values), note, bounds)


def _margin(record: StepRecord, same: np.ndarray, seed: int) -> float:
    """Largest distance of draw and probability among the flipped bits of a step."""
    step, bits = record.step, same.shape[-1]
    uniforms = step_uniforms(seed, step.clip, step.step_in_clip, step.thw, bits)
    return float(np.abs(uniforms - probabilities(record).reshape(same.shape))[~same].max())
