"""Rollouts on many machines: Ray actors fly, the driver keeps the collection.

Every actor has a copy of the networks and environments of its own, and flies as `rollout.LocalFlier` does: the same
seeds give the same flights as without Ray, on machines whose processors round alike. What an actor loses when its
machine dies is a `LostFlight` for each candidate that it had; another actor takes its place and they are flown anew.

Ray is imported when workers are started, never before: `pip install "worldvln-edge[ray]"`.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from math import ceil
from types import ModuleType
from typing import Any

import torch

from worldvln_edge.config import ConfigError
from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.environment import Environments
from worldvln_edge.training.grpo.candidates import Candidate
from worldvln_edge.training.grpo.early_stopping import AnyRule
from worldvln_edge.training.grpo.rollout import FlierIdentity, LocalFlier, check_rules, identity_of
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.grpo.wave import LostFlight, Outcome

_CLOSE_WITHIN_S = 10.0

OpenEnvironments = Callable[[], AbstractContextManager[Environments]]
"""Opens the environments of one actor, such as `functools.partial(LocalEnvironments, processes=1)`. It is sent to the
actor's machine, so it must be something that can be imported there."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    workers: int
    address: str | None = None  # of a running cluster, such as `auto`; None: one is started here and ends with the run
    cpus_per_worker: int = 1  # that Ray sets aside for an actor, and PyTorch's threads in it
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 1 or not self.gpus_per_worker >= 0:
            raise ConfigError(
                "Ray needs workers >= 1, cpus_per_worker >= 1 and gpus_per_worker >= 0, found "
                f"{self.workers}, {self.cpus_per_worker} and {self.gpus_per_worker}"
            )


class RayWorkers:
    """Actors with their environments, for as many policies as fly in turn. A context manager.

    Args:
        open_environments: of one actor.
        config: how many actors, and where.

    Raises:
        ConfigError: on entering: Ray is not installed or does not start, there is no cluster at the address, or it is
            too small for the workers.
    """

    def __init__(self, open_environments: OpenEnvironments, config: RayConfig):
        self._open_environments, self.config = open_environments, config
        self.actors: list[Any] = []
        self._started = ExitStack()

    def __enter__(self) -> RayWorkers:
        ray = _ray()
        with ExitStack() as stack:
            if not ray.is_initialized():
                self._connect(ray)
                stack.callback(ray.shutdown)
            self._check_room(ray)
            stack.callback(self._end_actors, ray)
            self.actors = [self._actor(ray) for _ in range(self.config.workers)]
            self._started = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def replace(self, dead: Any) -> Any:
        """A new actor in the place of one that died: calls of one that Ray starts again would fail until it is back."""
        actor = self._actor(_ray())
        self.actors[self.actors.index(dead)] = actor
        return actor

    def _actor(self, ray: ModuleType) -> Any:
        config = self.config
        kind = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker)(_Worker)
        return kind.remote(self._open_environments, config.cpus_per_worker)

    def _end_actors(self, ray: ModuleType) -> None:
        """End their simulators; an actor that is dead or busy is killed all the same."""
        actors, self.actors = self.actors, []
        gone = ray.exceptions.RayActorError, ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError
        closing = [actor.close.remote() for actor in actors]
        for actor, closed in zip(actors, closing, strict=True):
            with suppress(*gone):
                ray.get(closed, timeout=_CLOSE_WITHIN_S)
            ray.kill(actor)

    def _check_room(self, ray: ModuleType) -> None:
        """An actor that fits nowhere would be waited for without end."""
        config, there = self.config, ray.cluster_resources()
        cpus, gpus = config.workers * config.cpus_per_worker, config.workers * config.gpus_per_worker
        if cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0):
            raise ConfigError(
                f"{config.workers} Ray workers need {cpus} CPUs and {gpus:g} GPUs, the cluster has "
                f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}; start fewer (--ray), or add machines to it"
            )

    def _connect(self, ray: ModuleType) -> None:
        """Join a cluster, or start one that is as large as the actors need.

        Ray listens on every network of the machine; a cluster that is started here asks for the token that Ray keeps in
        `~/.ray/auth_token` (its default from 2.60 on, which is the oldest that we take).
        """
        config = self.config
        if config.address is not None:
            try:
                ray.init(address=config.address, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"no Ray cluster at {config.address!r} ({_first_line(error)}); start one with `ray start "
                    "--head`, or leave the address out to start one here"
                ) from error
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray only: nothing is reported to its makers
        try:
            ray.init(
                num_cpus=config.workers * config.cpus_per_worker,
                num_gpus=ceil(config.workers * config.gpus_per_worker),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
        except Exception as error:  # Ray raises nothing more specific when a part of it does not come up in time
            ray.shutdown()
            raise ConfigError(
                f"Ray did not start here ({_first_line(error)}); a busy machine is too slow for its time limit of "
                "about 30 s: give the same command again when there is less to do, or fly without Ray (--processes)"
            ) from error


class RayFlier:
    """A `Flier` over the actors of `RayWorkers`.

    Args:
        policy: the networks; each actor gets a copy, on the same kind of device and under the same autocast.
        workers: entered.
        rules, waves: see `LocalFlier`.

    Raises:
        ConfigError: networks on a GPU for actors without one, or `waves` below 1.
    """

    def __init__(self, policy: RolloutPolicy, workers: RayWorkers, *, rules: Sequence[AnyRule] = (), waves: int = 2):
        if policy.device.type != "cpu" and workers.config.gpus_per_worker <= 0:
            raise ConfigError(
                f"the networks are on {policy.device}, so every Ray worker needs a GPU: set gpus_per_worker, or load "
                "the networks on the CPU"
            )
        if waves < 1:
            raise ConfigError(f"waves must be >= 1, found {waves}")
        self._policy, self._workers = policy, workers
        self._rules, self._waves = tuple(rules), waves

    @property
    def identity(self) -> FlierIdentity:
        """See `Flier.identity`: Ray changes nothing about a flight."""
        return identity_of(self._policy, self._rules)

    def check(self, tasks: Sequence[Task]) -> None:
        """See `Flier.check`."""
        check_rules(self._rules, tasks)

    def fly(self, waiting: deque[Candidate]) -> Generator[Outcome, None, None]:
        """See `Flier.fly`.

        Raises:
            RuntimeError: the workers were not entered.
            RayTaskError: what an actor's environments raised for a call that was wrong as a whole.
        """
        if not self._workers.actors:
            raise RuntimeError("no Ray workers: use RayWorkers as a context manager")
        ray, size = _ray(), self._policy.rows * self._waves
        orders = _Orders.of(self._policy, self._rules, self._waves)
        policy = ray.put(self._policy)
        idle = list(self._workers.actors)
        for actor in idle:
            actor.take.remote(policy, orders)
        flying: dict[Any, tuple[Any, list[Candidate]]] = {}
        while waiting or flying:
            while waiting and idle:
                # A small rest is shared, not flown by one.
                chosen = [waiting.popleft() for _ in range(min(size, ceil(len(waiting) / len(idle))))]
                actor = idle.pop(0)
                flying[actor.fly.remote(chosen)] = actor, chosen
            (done,), _ = ray.wait(list(flying), num_returns=1)
            actor, chosen = flying.pop(done)
            try:
                outcomes = ray.get(done)
            except ray.exceptions.RayActorError as error:
                message = f"the Ray worker that flew it died ({_first_line(error)})"
                outcomes = [LostFlight(candidate=one, code="lost", message=message) for one in chosen]
                actor = self._workers.replace(actor)
                actor.take.remote(policy, orders)
            idle.append(actor)
            yield from outcomes


@dataclass(frozen=True, kw_only=True)
class _Orders:
    """How an actor flies a policy."""

    rules: tuple[AnyRule, ...]
    waves: int
    autocast: torch.dtype | None

    @classmethod
    def of(cls, policy: RolloutPolicy, rules: tuple[AnyRule, ...], waves: int) -> _Orders:
        device = policy.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(rules=rules, waves=waves, autocast=autocast)


class _Worker:
    """What an actor holds."""

    def __init__(self, open_environments: OpenEnvironments, threads: int):
        torch.set_num_threads(threads)
        self._open = ExitStack()
        self._environments = self._open.enter_context(open_environments())
        self._flier: LocalFlier | None = None
        self._autocast: tuple[str, torch.dtype | None] = ("cpu", None)

    def take(self, policy: RolloutPolicy, orders: _Orders) -> None:
        """Fly with these networks from now on."""
        self._flier = LocalFlier(policy, self._environments, rules=orders.rules, waves=orders.waves)
        self._autocast = policy.device.type, orders.autocast

    def fly(self, candidates: list[Candidate]) -> list[Outcome]:
        if self._flier is None:
            raise RuntimeError("no networks: they could not be brought to this worker")
        device, dtype = self._autocast
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            return list(self._flier.fly(deque(candidates)))

    def close(self) -> None:
        self._open.close()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f'Ray is not installed ({error}); pip install "worldvln-edge[ray]", or fly without Ray'
        ) from error
