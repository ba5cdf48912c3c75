"""Why the actions of two schedules differ: by the draws of bits on a border, or by a fault.

The schedules add the same numbers in another order, so probabilities differ by rounding. A bit is drawn by comparing a
uniform number u with its probability p; where the two nearly meet, rounding decides, and everything after that bit
differs. So the first bits that differ in a segment are looked at: with |u - p| below the border they are rounding,
otherwise one of the schedules is wrong. Source: spec/world_model.md 6, 9.4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from worldvln_edge.runtime.bench.full_horizon import FullHorizonFlight
from worldvln_edge.runtime.engines.engine import Engine, Tensor
from worldvln_edge.runtime.worldvln.graphs import WORLD_MODEL_STEP
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

BORDER = 1e-4
"""Largest |u - p| at which rounding may decide a bit."""


class SegmentAgreement(msgspec.Struct, frozen=True, kw_only=True):
    segment: int
    steps_equal: int
    """Steps in front of the first one with a differing bit."""
    steps: int
    differing_bits: int
    """In the first step that has any."""
    largest_border: float
    """Largest |u - p| among those bits; 0 when there are none."""
    largest_probability_difference: float
    """Over the equal steps and the first differing one."""
    largest_action_difference: float
    """cm or deg."""

    def is_rounding(self, tolerance: float) -> bool:
        """Equal bits and equal actions, or bits whose draw lay on the border."""
        if self.differing_bits:
            return self.largest_border < BORDER
        return self.largest_action_difference <= tolerance


class _StepRecorder:
    """`world_model_step`, with bits and probabilities brought to the host and kept."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """Uniforms, bits and probabilities of every call, [T, h, w, bits] each."""

    def run(
        self,
        inputs: Mapping[str, Tensor],
        in_place: Mapping[str, Any] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        wanted = None if fetch is None else {*fetch, "bits", "probabilities"}
        outputs = self._engine.run(inputs, in_place, fetch=wanted)
        self.calls.append((inputs["uniforms"], outputs["bits"], outputs["probabilities"]))
        return outputs


def compare_segments(
    policy: WorldVLNPolicy, frames: Sequence[np.ndarray], prompt: str, seed: int
) -> list[SegmentAgreement]:
    """Fly one episode of both schedules, untimed, and compare every drawn bit up to the first that differs.

    Args:
        policy: its engines are put back when the comparison ends.
        frames: uint8 RGB [H, W, 3], up to the start of the last segment at least.
        prompt, seed: of both flights.
    """
    engines = policy.engines
    recorder = _StepRecorder(engines[WORLD_MODEL_STEP])
    policy.engines = {**engines, WORLD_MODEL_STEP: recorder}
    try:
        session, flight = policy.new_session(prompt, seed=seed), FullHorizonFlight(policy, prompt, seed=seed)
        found, observed = [], 0
        for segment, point in enumerate(policy.info.horizon.points[:-1]):
            recorder.calls = []
            ours = session.observe(frames[observed:point])
            drawn = recorder.calls
            recorder.calls = []
            theirs = flight.observe(frames[observed:point])
            assert ours is not None  # a segment starts at every point
            first_clip = len(session.observed_clips)
            skipped = sum(len(clip.steps) for clip in policy.tables.schedule.clips[:first_clip])
            difference = float(np.abs(ours.actions - theirs.actions).max())
            found.append(_segment(segment, drawn, recorder.calls[skipped : skipped + len(drawn)], difference))
            observed = point
        session.close()
        return found
    finally:
        policy.engines = engines


def _segment(segment: int, drawn: list, others: list, action_difference: float) -> SegmentAgreement:
    largest, count, border, equal = 0.0, 0, 0.0, 0
    for (uniforms, bits, probabilities), (_, other_bits, other_probabilities) in zip(drawn, others, strict=True):
        largest = max(largest, float(np.abs(probabilities - other_probabilities).max()))
        differing = bits != other_bits
        count = int(differing.sum())
        if count:
            border = float(np.abs(uniforms - probabilities)[differing].max())
            break
        equal += 1
    return SegmentAgreement(
        segment=segment,
        steps_equal=equal,
        steps=len(drawn),
        differing_bits=count,
        largest_border=border,
        largest_probability_difference=largest,
        largest_action_difference=action_difference,
    )
