"""Free flights: the bundle draws its own bits from the same uniform numbers as PyTorch.

In fp32 a bit may only flip at a tie: its uniform number lies within `TIE` of its probability, so rounding may decide
either way. Everything drawn after it may differ, so actions are compared where all bits of a segment are equal. In
lower precision bits do flip; the row then reports how many agree, and how far the actions of all segments are apart.
Source: spec/world_model.md 6, 9.6.
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.export.parity_bounds import ParityRow, StageBounds, VerifyError, bounds_of_flights
from worldvln_edge.export.stage_parity import action_difference, action_values, probabilities, records_of
from worldvln_edge.export.torch_flight import TorchSegment
from worldvln_edge.models.generation import StepRecord
from worldvln_edge.noise import step_uniforms
from worldvln_edge.runtime.worldvln_policy import WorldVLNPolicy


class FlightParity:
    """Sums over flights.

    Args:
        policy: of the bundle.
        flips_at_ties_only: the rule of fp32.
    """

    def __init__(self, policy: WorldVLNPolicy, *, flips_at_ties_only: bool):
        self.policy, self.flips_at_ties_only = policy, flips_at_ties_only
        self.points = policy.config.horizon.points
        self.equal = {"observed": 0, "drawn": 0}
        self.total = {"observed": 0, "drawn": 0}
        self.margin: float | None = None
        self.actions: list[np.ndarray] = []
        self.flights = 0

    def add(self, instruction: str, video: list[np.ndarray], seed: int, segments: list[TorchSegment]) -> None:
        """Fly as a session does, frame by frame of the same video.

        Raises:
            VerifyError: the bundle gives no actions where PyTorch does.
        """
        self.flights += 1
        session, sent = self.policy.new_session(instruction, seed=seed), 0
        for index, segment in enumerate(segments):
            chunk = session.observe(video[sent : self.points[index]])
            sent = self.points[index]
            if chunk is None:
                raise VerifyError(f"the bundle gave no actions for segment {index}")
            observed = [clip.bits for clip in session.observed_clips]
            drawn = [clip.bits for clip in session.last_prediction]
            margin = self._compare_bits([*observed, *drawn], len(observed), segment, seed)
            if margin is None or not self.flips_at_ties_only:
                self.actions.append(action_difference(chunk.actions, segment.actions))
            if margin is not None:
                self.margin = max(self.margin or 0.0, margin)

    def _compare_bits(
        self, clips: list[tuple[np.ndarray, ...]], observed: int, segment: TorchSegment, seed: int
    ) -> float | None:
        """Margin of the first flip; None where no bit flipped, 0 where it is an observed one."""
        margin = None
        for index, bits in enumerate(clips):
            kind = "observed" if index < observed else "drawn"
            for found, record in zip(bits, records_of(segment, index), strict=True):
                same = found == record.bits_BThwd[0].numpy()
                self.equal[kind] += int(same.sum())
                self.total[kind] += same.size
                if not same.all() and margin is None:
                    margin = _margin(record, same, seed) if kind == "drawn" else 0.0
        return margin

    def row(self, bounds: StageBounds) -> ParityRow:
        """The row `flight`."""
        shares = {kind: self.equal[kind] / self.total[kind] for kind in self.equal if self.total[kind]}
        values = {f"{kind}_bits_equal": share for kind, share in shares.items()}
        failures: list[str] = []
        note = ""
        if self.actions:
            values |= action_values(self.actions)
        else:
            failures.append("no segment had equal bits, so no actions were compared; try another --seed")
        if self.flips_at_ties_only and self.margin is not None:
            values["first_flip_margin"] = self.margin
            note = f"tie at {self.margin:.1e}"
        limits = bounds_of_flights(bounds, self.flights)
        return ParityRow("flight", values, failures + limits.failures(values), note)


def _margin(record: StepRecord, same: np.ndarray, seed: int) -> float:
    """Largest distance of draw and probability among the flipped bits of a step."""
    step, bits = record.step, same.shape[-1]
    uniforms = step_uniforms(seed, step.clip, step.step_in_clip, step.thw, bits)
    return float(np.abs(uniforms - probabilities(record).reshape(same.shape))[~same].max())
