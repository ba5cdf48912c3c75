"""How many environment steps a second the simulators give: in this process, in a pool, and behind HTTP.

A step is one action flown and one frame rendered. The pool and the server fly the same tasks with the same actions, 16
at a time, as a rollout does; creating the environments is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.client import RemoteEnvironments
from worldvln_edge.training.environments.environment import EnvironmentFault, Environments
from worldvln_edge.training.environments.pool import LocalEnvironments, PoolConfig
from worldvln_edge.training.environments.server import BackgroundEnvironmentServer, EnvironmentServerConfig
from worldvln_edge.training.sim.simulator import Simulator
from worldvln_edge.training.sim.tasks import generate_task

Way = Literal["direct", "local", "http"]
_SEGMENT = 16
_ACTION = (20.0, 0.0, 0.0, 0.0, 2.0, 0.0)


class BenchError(RuntimeError):
    """An environment failed while it was measured."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    way: Way
    """direct: a Simulator in this process; local: LocalEnvironments; http: RemoteEnvironments and a server."""
    processes: int
    environments: int
    image_hw: tuple[int, int]
    steps: int
    seconds: float

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds


def run_bench(
    *,
    processes: Sequence[int] = (1, 2),
    environments: int = 16,
    image_hw: tuple[int, int] = (64, 64),
    rounds: int = 6,
    on_row: Callable[[BenchRow], None] | None = None,
) -> list[BenchRow]:
    """Measure `direct`, then `local` and `http` for each number of processes.

    Args:
        processes: numbers of simulator processes.
        environments: flights at the same time.
        image_hw: rows and columns of the frames.
        rounds: times that every environment flies 16 actions.
        on_row: told of each row as soon as it is measured.

    Raises:
        BenchError: an environment failed.
        SimulatorStartError: the simulator cannot run here.
    """
    tasks = {f"bench-{i}": generate_task("train", i) for i in range(environments)}
    rows: list[BenchRow] = []

    def add(way: Way, number: int, seconds: float) -> None:
        steps = rounds * _SEGMENT * environments
        rows.append(
            BenchRow(
                way=way,
                processes=number,
                environments=environments,
                image_hw=image_hw,
                steps=steps,
                seconds=seconds,
            )
        )
        if on_row is not None:
            on_row(rows[-1])

    add("direct", 1, _fly_directly(list(tasks.values()), image_hw, rounds))
    for number in processes:
        pool = PoolConfig(processes=number, per_process=environments, max_side=max(image_hw))
        with LocalEnvironments(config=pool) as local:
            add("local", number, _fly(local, tasks, image_hw, rounds))
        with ExitStack() as stack:
            server = stack.enter_context(BackgroundEnvironmentServer(EnvironmentServerConfig(pool=pool)))
            remote = stack.enter_context(RemoteEnvironments(server.url))
            add("http", number, _fly(remote, tasks, image_hw, rounds))
    return rows


def bench_table(rows: Sequence[BenchRow]) -> str:
    """Text for people."""
    lines = [f"{'way':<8}{'processes':>10}{'environments':>14}{'frames':>10}{'steps/s':>10}"]
    for row in rows:
        size = f"{row.image_hw[0]}x{row.image_hw[1]}"
        lines.append(f"{row.way:<8}{row.processes:>10}{row.environments:>14}{size:>10}{row.steps_per_s:>10.0f}")
    return "\n".join(lines)


def _fly(environments: Environments, tasks: dict[str, Task], image_hw: tuple[int, int], rounds: int) -> float:
    """Seconds of the steps; a first round, which loads textures, is not counted."""
    _refuse_faults(environments.create(tasks, image_hw=image_hw).values())
    _refuse_faults(environments.reset(list(tasks)).values())
    actions = dict.fromkeys(tasks, np.tile(_ACTION, (_SEGMENT, 1)))
    _refuse_faults(environments.step(actions).values())
    start_s = time.perf_counter()
    for _ in range(rounds):
        _refuse_faults(environments.step(actions).values())
    return time.perf_counter() - start_s


def _fly_directly(tasks: Sequence[Task], image_hw: tuple[int, int], rounds: int) -> float:
    seconds = 0.0
    simulator, scene = None, None
    for task in tasks:
        if simulator is None or task.scene != scene:
            if simulator is not None:
                simulator.close()
            simulator, scene = Simulator.for_task(task, image_hw=image_hw), task.scene
            simulator.reset(task.initial_pos)
        simulator.reset(task.initial_pos)
        start_s = time.perf_counter()
        for _ in range(rounds * _SEGMENT):
            simulator.step(_ACTION)
        seconds += time.perf_counter() - start_s
    if simulator is not None:
        simulator.close()
    return seconds


def _refuse_faults(answers: Iterable[object]) -> None:
    for answer in answers:
        if isinstance(answer, EnvironmentFault):
            raise BenchError(f"an environment failed while it was measured: {answer.message}")
