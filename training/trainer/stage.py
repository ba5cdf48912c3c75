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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MicroBatch = Sequence[int]
"""Rows that go through the networks together."""
_NAMED_ROWS = 4  # of a micro-batch, in a message


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with a learning rate of their own."""

    parameters: Sequence[nn.Parameter]
    rate: float = 1.0
    """Multiplies the learning rate."""


class Stage(Protocol):
    """One stage, built from networks, data and a config of its own.

    A stage may also have these members; the functions below ask for them:

    - `parameter_groups() -> Sequence[ParameterGroup]`: learning rates that differ within the network. Parameters that
      are named nowhere have the plain rate.
    - `epoch_started(epoch: int) -> None`: called before the first step of an epoch (0-based) and after a resume, with
      the network still whole: freeze and thaw (`requires_grad`), change `coefficients`.
    - `shard_units() -> Sequence[nn.Module]`: modules whose parameters lie on one rank only while they run, for
      networks that are too large for one GPU. Each is called as a module (not by a method besides `forward`).
    - `best_metric: str`: the metric of `validate` whose smallest value marks the step that is kept and exported.
    - `row_name(row: int) -> str`: file and row, for messages.
    - `flops(batch) -> int` and `tokens(batch) -> int`: of forward and backward of a micro-batch, for MFU and tokens/s.
    """

    @property
    def name(self) -> str:
        """As in spec/training.md 0: `vae`, `sft`, `adapter`, `action`, `rgb_head`."""

    @property
    def network(self) -> nn.Module:
        """What is trained; parameters that stay as they are have `requires_grad` False."""

    @property
    def coefficients(self) -> Mapping[str, float]:
        """What is minimised: the sum of coefficient * term; read every step. Terms without one are logged only."""

    def plan(self, epoch: int) -> Sequence[Sequence[MicroBatch]]:
        """The steps of an epoch, each the micro-batches of one optimiser step; every row once."""

    def load(self, epoch: int, rows: MicroBatch) -> Any:
        """Read the rows and make every draw that belongs to them; may run in a worker process, so without networks.

        Tensors are on the CPU; `totals` moves them.
        """

    def weights(self, batch: Any) -> Mapping[str, float]:
        """Denominator of every term over this micro-batch, without running a network.

        A term may be missing where the micro-batch has nothing of it.
        """

    def totals(self, batch: Any) -> Mapping[str, Tensor]:
        """Numerator of every term: scalars, with a gradient where the term has a coefficient. Terms as in `weights`."""

    def validate(self) -> Mapping[str, float]:
        """Metrics on held-out rows, without random corruption; empty where the stage has no held-out rows.

        Networks are in eval mode and draw nothing; every rank gets the same numbers.
        """


def parameter_groups(stage: Stage) -> list[ParameterGroup]:
    """All parameters of a stage's network, each in one group, those without a rate of their own first."""
    own = _optional(stage, "parameter_groups", lambda: ())()
    named = {id(parameter) for group in own for parameter in group.parameters}
    rest = [parameter for parameter in stage.network.parameters() if id(parameter) not in named]
    return [ParameterGroup(parameters=rest), *own]


def start_epoch(stage: Stage, epoch: int) -> None:
    """Tell a stage that wants to know that an epoch begins."""
    _optional(stage, "epoch_started", lambda epoch: None)(epoch)


def shard_units(stage: Stage) -> list[nn.Module]:
    """Modules that are sharded one by one; the rest of the network is one unit."""
    return list(_optional(stage, "shard_units", lambda: ())())


def best_metric(stage: Stage) -> str | None:
    """Metric that says which step is the best, None where the last one is."""
    return getattr(stage, "best_metric", None)


def listed_rows(stage: Stage, rows: Sequence[int]) -> str:
    """`rows [12, 7]` for a message, the first of them by name where the stage says how they are called."""
    row_name = _optional(stage, "row_name", lambda row: None)
    names = [name for row in rows[:_NAMED_ROWS] if (name := row_name(row)) is not None]
    more = ["..."] if len(rows) > _NAMED_ROWS else []
    return f"rows {list(rows)}" + (f" ({'; '.join(names + more)})" if names else "")


def batch_flops(stage: Stage, batch: Any) -> int | None:
    """FLOP of forward and backward of a micro-batch, None where the stage does not say."""
    return _optional(stage, "flops", lambda batch: None)(batch)


def batch_tokens(stage: Stage, batch: Any) -> int | None:
    """Tokens of a micro-batch, None where the stage does not say."""
    return _optional(stage, "tokens", lambda batch: None)(batch)


def _optional(stage: Stage, name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(stage, name, otherwise)


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
