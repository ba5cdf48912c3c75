"""What a stage of training is to the trainer: rows, micro-batches, and losses that can be summed over ranks.

A stage owns its networks, its data and its config; the trainer owns steps, ranks, optimiser, checkpoints and logs. The
contract keeps a run a function of (config, data, seed) and of nothing else:

- a micro-batch is the same on any number of ranks, and so are the micro-batches of a step; ranks share them out;
- everything random about a row comes from `row_generator(seed, epoch, row)`; what networks draw while they run
  (stochastic depth) comes from PyTorch's global generator, which the trainer seeds for every micro-batch;
- a loss is a sum over rows divided by a sum of weights, and the weights are known before any network runs: so the
  denominators are those of the whole step, over all micro-batches and ranks (spec/training.md 2.6, 4.5).

Source: spec/training.md 1.5 (packing, random streams), 2.6 (denominators), 2.8 (resume).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MicroBatch = Sequence[int]
"""Rows that go through the networks together."""


class Stage(Protocol):
    """One stage, built from networks, data and a config of its own."""

    name: str
    """As in spec/training.md 0: `vae`, `sft`, `adapter`, `action`, `rgb_head`."""

    network: nn.Module
    """What is trained; parameters that stay as they are have `requires_grad` False."""

    coefficients: Mapping[str, float]
    """What is minimised: the sum of coefficient * term. Terms that are not named are logged only."""

    def plan(self, epoch: int) -> Sequence[Sequence[MicroBatch]]:
        """The steps of an epoch, each the micro-batches of one optimiser step; every row once."""

    def load(self, epoch: int, rows: MicroBatch) -> Any:
        """Read the rows and make every draw that belongs to them; may run in a worker process, so without networks."""

    def weights(self, batch: Any) -> Mapping[str, float]:
        """Denominator of every term over this micro-batch, without running a network."""

    def totals(self, batch: Any) -> Mapping[str, Tensor]:
        """Numerator of every term: scalars, with a gradient where the term has a coefficient."""

    def validate(self) -> Mapping[str, float]:
        """Metrics on held-out rows, without random corruption; empty where the stage has no held-out rows."""


def row_generator(seed: int, epoch: int, row: int) -> torch.Generator:
    """CPU generator of one row in one epoch: its draws do not depend on batch, rank or worker."""
    mixed = ((seed * 1_000_003 + epoch) * 1_000_003 + row) % 2**63
    return torch.Generator().manual_seed(mixed)


def epoch_order(seed: int, epoch: int, rows: int) -> list[int]:
    """All rows in the order of one epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def split_steps(order: Sequence[int], *, step_rows: int, micro_rows: int) -> list[list[list[int]]]:
    """Cut an epoch's order into steps of `step_rows` rows and those into micro-batches of at most `micro_rows`.

    The last step holds what is left, so that every row comes once.
    """
    steps = [order[first : first + step_rows] for first in range(0, len(order), step_rows)]
    return [[list(step[at : at + micro_rows]) for at in range(0, len(step), micro_rows)] for step in steps]
