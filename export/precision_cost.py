"""What a precision costs: the bundle against the checkpoint in float32, nothing rounded.

`mean_abs` is the mean difference of the probabilities of all bits where both sides see the same past: the share of
draws that would differ. Only this is bounded. How far the actions of a free flight move after a flip is a matter of the
model and of what it was about to draw, so bits and actions of free flights are told and not bounded; the closed loop
(`verify --closed-loop`) says what they are worth.
Source: spec/world_model.md 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from worldvln_edge.export.flight_parity import BitShares, FlownSegment
from worldvln_edge.export.forced_flight import forced_clips, probabilities, records_of
from worldvln_edge.export.parity_bounds import (
    Differences,
    ParityRow,
    StageBounds,
    action_difference,
    action_values,
    bounded_row,
)
from worldvln_edge.export.torch_flight import TorchSegment
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

STAGE = "precision_cost"


class PrecisionCost:
    """Sums over flights.

    Args:
        policy: of the bundle.
    """

    def __init__(self, policy: WorldVLNPolicy):
        self.policy = policy
        self.probabilities = Differences()
        self.bits = BitShares()
        self.actions: list[np.ndarray] = []

    def add(self, instruction: str, flown: Sequence[FlownSegment], exact: Sequence[TorchSegment]) -> None:
        """One flight of the bundle, and the checkpoint's with the same seed (`without_features` will do)."""
        for segment, index, clip in forced_clips(self.policy, instruction, exact):
            for record, found in zip(records_of(segment, index), clip.probabilities, strict=True):
                self.probabilities.add(found, probabilities(record).reshape(found.shape))
        for own, segment in zip(flown, exact, strict=True):
            for _ in self.bits.compare(own, segment):
                pass  # it counts
            self.actions.append(action_difference(own.actions, segment.actions))

    def row(self, bounds: StageBounds) -> ParityRow:
        """The row `precision_cost`."""
        values = {"mean_abs": self.probabilities.mean_abs, "max_abs": self.probabilities.max_abs}
        return bounded_row(STAGE, {**values, **self.bits.values(), **action_values(self.actions)}, bounds)


def without_features(segment: TorchSegment) -> TorchSegment:
    """The segment without the large arrays that a cost does not need: flights of the checkpoint wait in memory."""
    nothing = torch.empty(0)
    records = [
        dataclasses.replace(
            record, input_BcTHW=nothing, hidden_RLC=nothing, logits_RLd2=nothing, summed_BcTHW=nothing, kv_shapes={}
        )
        for record in segment.generated.records
    ]
    return dataclasses.replace(
        segment,
        generated=dataclasses.replace(segment.generated, records=records),
        features_1CFhw=nothing,
        tokens_FND=nothing,
        logits=nothing,
    )
