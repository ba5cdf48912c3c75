"""What a comparison of checkpoints found: a file, and a table for a terminal or a model card.

Source: spec/training.md 8.4 (paired by task and seed, standard error over tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from worldvln_edge.atomic import atomic_file
from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.training.grpo.held_out import PairedDifference
from worldvln_edge.training.grpo.scored_collection import GrpoError
from worldvln_edge.training.grpo.stopping_saving import StoppingSaving

COMPARISON_FILE = "comparison.json"
"""In the work folder of the comparison."""


class ComparedPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checkpoint in the table; differences are to the first one."""

    checkpoint: str
    flights: int
    failed: int
    reward: float
    success: float
    reward_difference: PairedDifference | None
    """None: it is the first one."""
    success_difference: PairedDifference | None
    k3: float | None
    """Mean over the bits that this policy drew, from the first one: how far it has moved."""
    clipped: float | None
    """Of the last pass of its training; None: the checkpoint has no GRPO table."""
    environment_steps: float | None
    """That its training flew; None alike."""
    stopping: StoppingSaving | None
    """What early stopping would have saved, by the rules that all tasks are made for.

    None: they are made for none, or the flights were flown with rules of the recipe.
    """


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Policies on the same tasks and seeds."""

    tasks: int
    rollouts: int
    """Flights of a task."""
    policies: tuple[ComparedPolicy, ...]


def write_comparison(found: Comparison, folder: Path) -> None:
    """Write it, whole or not at all. Raises GrpoError where it cannot be written."""
    path = folder / COMPARISON_FILE
    try:
        with atomic_file(path) as building:
            building.write_bytes(msgspec.json.encode(found) + b"\n")
    except OSError as error:
        raise GrpoError(f"{path}: cannot be written ({error}); make room and give the same command again") from error


def read_comparison(folder: Path) -> Comparison:
    """What `write_comparison` wrote. Raises GrpoError: there is none."""
    path = folder / COMPARISON_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except OSError as error:
        raise GrpoError(f"{path}: {error.strerror}; give the --work folder of `train grpo-compare`") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GrpoError(f"{path}: no comparison ({error}); give the command of the comparison again") from error


def comparison_parts(found: Comparison) -> list[Part]:
    """A sentence, the table, and what early stopping would have saved."""
    first = found.policies[0].checkpoint
    return [
        f"{found.tasks} tasks, {found.rollouts} flights each, with the same seeds for every checkpoint; differences to "
        f"{first}, paired by task and seed, with their standard errors over tasks:",
        _table(found.policies),
        *(_stopping(one, one.stopping) for one in found.policies if one.stopping is not None),
    ]


def _table(policies: Sequence[ComparedPolicy]) -> Table:
    header = ("checkpoint", "flights", "reward", "difference", "success", "difference", "k3", "clipped", "env steps")
    rows = [
        (
            one.checkpoint,
            str(one.flights),
            f"{one.reward:.4f}",
            _difference(one.reward_difference, ".4f"),
            f"{one.success:.1%}",
            _points(one.success_difference),
            _number(one.k3, ".4f"),
            _number(one.clipped, ".3f"),
            _number(one.environment_steps, ".0f"),
        )
        for one in policies
    ]
    return Table(header, tuple(rows))


def _stopping(one: ComparedPolicy, saving: StoppingSaving) -> str:
    return (
        f"Early stopping ({', '.join(saving.rules)}) would save {saving.saved:.1%} of the environment steps of "
        f"{one.checkpoint}: it ends {saving.stopped} of {one.flights} flights, success "
        f"{_points(saving.success_difference)} points, reward {_difference(saving.reward_difference, '.4f')}."
    )


def _points(found: PairedDifference | None) -> str:
    return _difference(found, ".1f", scale=100)


def _difference(found: PairedDifference | None, form: str, *, scale: float = 1) -> str:
    if found is None:
        return "-"
    error = "-" if found.standard_error is None else format(scale * found.standard_error, form)
    return f"{format(scale * found.mean, '+' + form)} ± {error}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
