"""Rollouts: candidates fly their tasks in simulator environments, many through the networks at once.

Flights go in waves of `RolloutPolicy.rows`, in step, segment after segment. Two waves take turns: while the simulators
fly one, the networks plan the other. A flight that cannot be finished is a `LostFlight` and ends nothing else.
Environments may be shared with others: a wave waits until they have room for it.
Source: spec/training.md 5.2, 5.9 item 1; spec/seed_systems.md 3.4.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from worldvln_edge.config import ConfigError
from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.environment import Environments
from worldvln_edge.training.grpo.candidates import Candidate
from worldvln_edge.training.grpo.early_stopping import AnyRule
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.grpo.wave import Outcome, Wave


@dataclass(frozen=True, kw_only=True)
class FlierIdentity:
    """What the flights of a collection depend on besides tasks and seeds."""

    checkpoint_digest: str
    policy_scales: PolicyScales
    repetitions: Repetitions
    rows: int
    rules: tuple[AnyRule, ...]


class Flier(Protocol):
    """Flies candidates: here (`LocalFlier`), or on many machines (`ray_rollout.RayFlier`)."""

    @property
    def identity(self) -> FlierIdentity: ...

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise ConfigError when a rule cannot be applied to a task."""
        ...

    def fly(self, waiting: deque[Candidate]) -> Generator[Outcome, None, None]:
        """Take candidates from the left until none is left, and yield what became of each, as they end.

        The caller may append while it holds an outcome (the retry of a lost flight).
        """
        ...


class LocalFlier:
    """Flies with networks of this process.

    Args:
        policy: the networks.
        environments: where; at least one must be free.
        rules: of early stopping.
        waves: that take turns; 1 lets networks and simulators wait for each other. Two need at least twice as many
            candidates as `RolloutPolicy.rows`, and room in the environments for both.

    Raises:
        ConfigError: `waves` below 1.
    """

    def __init__(
        self, policy: RolloutPolicy, environments: Environments, *, rules: Sequence[AnyRule] = (), waves: int = 2
    ):
        if waves < 1:
            raise ConfigError(f"waves must be >= 1, found {waves}")
        self._policy, self._environments = policy, environments
        self._rules, self._waves = tuple(rules), waves
        self._run = uuid.uuid4().hex[:12]  # environments may be shared with other runs

    @property
    def identity(self) -> FlierIdentity:
        return identity_of(self._policy, self._rules)

    def check(self, tasks: Sequence[Task]) -> None:
        """See `Flier.check`."""
        check_rules(self._rules, tasks)

    def fly(self, waiting: deque[Candidate]) -> Generator[Outcome, None, None]:
        """See `Flier.fly`.

        Raises:
            Exception: what the environments raise for a call that is wrong as a whole, or for a lost server.
        """
        room = max(1, self._environments.capacity // self._waves)
        size = min(self._policy.rows, room)
        waves = min(self._waves, self._environments.capacity)
        flying: dict[Future, Wave] = {}
        open_ids: set[str] = set()
        with ThreadPoolExecutor(waves, thread_name_prefix="environments") as threads:
            try:
                while waiting or flying:
                    while waiting and len(flying) < waves:
                        chosen = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                        wave = Wave(self._policy, self._environments, self._rules, chosen, self._run)
                        open_ids.update(wave.ids)
                        flying[threads.submit(wave.first_call())] = wave
                    ready, _ = wait(flying, return_when=FIRST_COMPLETED)
                    for done in ready:
                        wave = flying.pop(done)
                        call = wave.next_call(done.result())
                        if call is not None:
                            flying[threads.submit(call)] = wave
                        else:
                            open_ids.difference_update(wave.ids)
                        yield from wave.take_outcomes()
            finally:
                if open_ids:  # broken off
                    wait(flying)
                    self._environments.close(sorted(open_ids))


def identity_of(policy: RolloutPolicy, rules: tuple[AnyRule, ...]) -> FlierIdentity:
    """Of flights with these networks and rules, wherever they are flown."""
    return FlierIdentity(
        checkpoint_digest=policy.digest,
        policy_scales=policy.policy_scales,
        repetitions=policy.repetitions,
        rows=policy.rows,
        rules=rules,
    )


def check_rules(rules: Sequence[AnyRule], tasks: Sequence[Task]) -> None:
    """Raise ConfigError when a rule cannot be applied to a task."""
    for rule in rules:
        for task in tasks:
            rule.check(task)
