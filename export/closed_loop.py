"""Held-out tasks flown with two bundles, task by task: what does a precision cost in successes?

The simulator is reached through `worldvln-edge eval`, as a process of its own: this room knows no simulator.
Source: spec/session_protocol.md (flights); Wilson's interval for a rate; Newcombe's for the difference of
paired rates (Statistics in Medicine 17, 1998, 2635: Wilson limits added in squares, correlation corrected for
continuity).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NORMAL_95 = 1.959964
_POLICY = "policy"

Interval = tuple[float, float]


class ClosedLoopError(RuntimeError):
    """Tasks that could not be flown. The message holds the reason that `worldvln-edge eval` gave."""


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """Successes of two bundles on the same tasks and seeds."""

    successes: tuple[bool, ...]
    reference: tuple[bool, ...]
    """Of the fp32 bundle."""

    @property
    def difference(self) -> float:
        """Success rate minus the reference's."""
        return (sum(self.successes) - sum(self.reference)) / len(self.successes)

    def to_json(self) -> dict:
        """Rates, their 95 % intervals, and the paired difference with its own."""
        tasks = len(self.successes)
        pairs = list(zip(self.successes, self.reference, strict=True))
        return {
            "tasks": tasks,
            "success_rate": sum(self.successes) / tasks,
            "success_interval": list(wilson(sum(self.successes), tasks)),
            "fp32_success_rate": sum(self.reference) / tasks,
            "fp32_success_interval": list(wilson(sum(self.reference), tasks)),
            "difference": self.difference,
            "difference_interval": list(paired_interval(self.successes, self.reference)),
            "won": sum(own and not other for own, other in pairs),
            "lost": sum(other and not own for own, other in pairs),
        }

    def measures(self) -> dict[str, float]:
        """`to_json` as plain numbers, intervals as `..._low` and `..._high`."""
        numbers: dict[str, float] = {}
        for name, value in self.to_json().items():
            if isinstance(value, list):
                numbers[f"{name}_low"], numbers[f"{name}_high"] = value
            else:
                numbers[name] = float(value)
        return numbers

    def summary(self) -> str:
        """Three lines for people."""
        found = self.to_json()

        def line(name: str, rate: float, interval: Sequence[float]) -> str:
            return f"{name:<12} {rate:6.1%}  [{interval[0]:.1%}, {interval[1]:.1%}]"

        return "\n".join(
            (
                f"closed loop, {found['tasks']} held-out tasks, 95 % intervals",
                line("this bundle", found["success_rate"], found["success_interval"]),
                line("fp32", found["fp32_success_rate"], found["fp32_success_interval"]),
                line("difference", found["difference"], found["difference_interval"])
                + f"  (paired: {found['won']} won, {found['lost']} lost)",
            )
        )


def wilson(successes: int, count: int) -> Interval:
    """95 % interval of a rate; `count` is above zero."""
    rate, z2 = successes / count, _NORMAL_95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_95 * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(own: Sequence[bool], other: Sequence[bool]) -> Interval:
    """95 % interval of the difference of two rates on the same tasks.

    Args:
        own, other: successes, task by task; at least one.
    """
    count = len(own)
    both = sum(a and b for a, b in zip(own, other, strict=True))
    won, lost = sum(own) - both, sum(other) - both
    neither = count - both - won - lost
    rates, difference = (sum(own) / count, sum(other) / count), (won - lost) / count
    (low1, high1), (low2, high2) = wilson(sum(own), count), wilson(sum(other), count)
    spread = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    together = both * neither - won * lost
    if together > 0:  # few tasks make flights look more alike than they are
        together = max(together - count / 2, 0.0)
    correlation = together / math.sqrt(spread) if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    below = reach(rates[0] - low1, high2 - rates[1])
    above = reach(high1 - rates[0], rates[1] - low2)
    return max(-1.0, difference - below), min(1.0, difference + above)


def fly_closed_loop(bundle: Path, reference: Path, *, tasks: int, seed: int, workers: int = 2) -> ClosedLoop:
    """Fly the first `tasks` tasks of the test split with both bundles.

    Args:
        bundle, reference: the one in question and an fp32 one of the same checkpoint.
        tasks: at least one.
        seed: of the draws, for both.
        workers: processes.

    Raises:
        ClosedLoopError: `worldvln-edge eval` failed, or the two did not fly the same tasks.
    """
    flown = [_evaluate(one, tasks, seed, workers) for one in (bundle, reference)]
    if list(flown[0]) != list(flown[1]):
        raise ClosedLoopError("the two bundles did not fly the same tasks")
    return ClosedLoop(successes=tuple(flown[0].values()), reference=tuple(flown[1].values()))


def _evaluate(bundle: Path, tasks: int, seed: int, workers: int) -> dict[str, bool]:
    """Task -> success, in the order of the tasks."""
    with tempfile.TemporaryDirectory(prefix="worldvln-closed-loop-") as folder:
        options = {"bundle": bundle, "split": "test", "count": tasks, "seed": seed, "workers": workers, "out": folder}
        command = [sys.executable, "-m", "worldvln_edge", "eval", "--no-baselines", "--json"]
        command += [f"--{name}={value}" for name, value in options.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ClosedLoopError(f"{bundle} could not be flown ({reason})")
    try:
        flights = json.loads(done.stdout)["flights"]
        return {flight["task"]: bool(flight["success"]) for flight in flights if flight["row"] == _POLICY}
    except (ValueError, KeyError, TypeError) as error:
        raise ClosedLoopError(f"`worldvln-edge eval` answered with something else than its JSON ({error})") from error
