"""Missions longer than the model's horizon: several instructions one after the other, flown as one chained session.

A mission starts as a held-out task of the simulator; every further leg is a motion from where the expert ended. The
pilot says the next instruction when the last segment of a leg was emitted, so the leg begins at the next horizon.
Source: spec/training.md 8.6; spec/session_protocol.md 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.runtime.bench.bench_table import Part, Table
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.sessions.chained_session import ChainedSession, chained_horizon
from worldvln_edge.runtime.sessions.policy import Policy
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.closed_loop import FlightError, ReplayPilot, expert_actions
from worldvln_edge.training.evaluation.evaluation import POLICY, evaluate
from worldvln_edge.training.evaluation.flight_statistics import Outcome, outcome
from worldvln_edge.training.sim.expert import EXPERT_STEPS, Goal, expert_path
from worldvln_edge.training.sim.instructions import TASK_KINDS
from worldvln_edge.training.sim.scene_model import load_scene_model
from worldvln_edge.training.sim.tasks import generate_task

THEN = ", then "
"""Between the instructions of a mission."""
_MOTIONS = [index for index, kind in enumerate(TASK_KINDS) if not kind.has_landmark]
_CLEARANCE_M, _LOWEST_CM, _HIGHEST_CM = 0.7, 150.0, 700.0
_DRAWS = 200


def generate_mission(index: int, legs: int) -> Task:
    """Mission number `index` of so many legs: the same one every time, in a held-out scene.

    Args:
        index: 0-based; kinds of the first leg take turns.
        legs: at least 1.

    Raises:
        ValueError: no legs.
        RuntimeError: no room for it in the scenes that were tried.
    """
    if legs < 1:
        raise ValueError(f"a mission needs at least one leg, found {legs}")
    turn, kind = divmod(index, len(_MOTIONS))
    for attempt in range(50):
        first = generate_task("test", (turn + 1000 * attempt) * len(TASK_KINDS) + _MOTIONS[kind])
        found = _go_on(first, legs, np.random.default_rng([7, index, legs, attempt]))
        if found is not None:
            return msgspec.structs.replace(found, task_id=f"mission-{legs}-{index:06d}")
    raise RuntimeError(f"found no room for mission {index} of {legs} legs")


def _go_on(first: Task, legs: int, rng: np.random.Generator) -> Task | None:
    assert first.scene is not None  # generated tasks have one
    model = load_scene_model(first.scene.family, first.scene.seed)
    path, texts = [np.array(pose) for pose in first.reference_path_raw], [first.instruction]
    for _ in range(legs - 1):
        for _ in range(_DRAWS):
            kind = TASK_KINDS[_MOTIONS[int(rng.integers(len(_MOTIONS)))]]
            magnitude = kind.draw_magnitude(rng)
            leg = expert_path(path[-1], Goal(kind.name, magnitude))
            is_high_enough = _LOWEST_CM <= leg[-1, 2] <= _HIGHEST_CM
            if is_high_enough and model.path_clearance_m(leg, stop_below_m=_CLEARANCE_M) >= _CLEARANCE_M:
                path += list(leg[1:])
                texts.append(kind.say(int(rng.integers(len(kind.templates))), magnitude))
                break
        else:
            return None
    poses = tuple(tuple(round(float(value), 4) for value in pose) for pose in path)
    return msgspec.convert(
        {
            **msgspec.to_builtins(first),
            "instruction": THEN.join(texts),
            "end_pos": poses[-1],
            "reference_path_raw": poses,
            "reference_path_preprocessed": (),
            "kind": f"{legs} legs",
            "magnitude": (),
        },
        Task,
    )


class MissionPilot:
    """A policy in this process, one chained session a mission; every leg is told when its horizon begins."""

    def __init__(self, policy: Policy, legs: int):
        self._policy, self._legs = policy, legs
        self._texts: list[str] = []
        self._session: ChainedSession | None = None
        self.points, self.image_hw = chained_horizon(policy.info.horizon, legs).points, policy.info.image_hw
        self.profile: str | None = None

    def start(self, task: Task, seed: int) -> None:
        self.end()
        self._texts = task.instruction.split(THEN)
        if len(self._texts) != self._legs:
            raise FlightError(f"task {task.task_id!r} has {len(self._texts)} legs, this pilot flies {self._legs}")
        self._session = ChainedSession(self._policy, self._texts[0], horizons=self._legs, seed=seed)

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        if self._session is None:
            raise RuntimeError("no flight; call start(task, seed) before observe(frames)")
        leg, is_new = divmod(self._session.emitted + 1, self._policy.info.horizon.segments)
        if leg and not is_new:
            self._session.set_prompt(self._texts[leg])
        chunk = self._session.observe(frames)
        if chunk is None:
            raise FlightError(f"the policy holds {self._session.frames} frames and gave no actions")
        self.profile = chunk.profile
        return chunk.actions

    def end(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class MissionResult(msgspec.Struct, frozen=True, kw_only=True):
    legs: int
    seconds: float
    """Of flight, at the model's frame rate."""
    policy: Outcome
    expert: Outcome


class MissionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge missions` prints."""

    model: str
    precision: str
    missions: int
    seed: int
    results: tuple[MissionResult, ...]


def measure_missions(
    bundle_folder: Path,
    *,
    legs: Sequence[int] = (1, 2, 3),
    missions: int = 48,
    seed: int = 0,
    backend: BackendName = "cpu",
    threads: int = 0,
    show_progress: bool = True,
) -> MissionReport:
    """Fly missions of every number of legs, and the expert's actions beside them.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        legs: each at least 1.
        missions: of each number of legs.
        seed: of the draws; mixed with each mission's own.
        backend, threads: see `load_policy`.
        show_progress: bars on stderr.

    Raises:
        BundleError, EngineError: see `load_policy`.
        FlightError: the model's horizon is not a leg; and see `evaluate`.
        RenderingUnavailableError: see `evaluate`.
        ValueError: a number of legs below 1.
    """
    policy = load_policy(bundle_folder, backend=backend, threads=threads)
    with closing(policy):
        return fly_missions(policy, legs=legs, missions=missions, seed=seed, show_progress=show_progress)


def fly_missions(
    policy: Policy, *, legs: Sequence[int], missions: int, seed: int = 0, show_progress: bool = True
) -> MissionReport:
    """As `measure_missions`, with a policy that is loaded."""
    horizon = policy.info.horizon
    if horizon.num_frames - 1 != EXPERT_STEPS:
        raise FlightError(
            f"a leg of a mission has {EXPERT_STEPS} actions, {policy.info.name} flies {horizon.num_frames - 1} a "
            "horizon; missions need a model of 49 frames"
        )
    results = []
    for count in legs:
        tasks = [generate_mission(index, count) for index in range(missions)]
        actions = count * EXPERT_STEPS
        pilots = (MissionPilot(policy, count), ReplayPilot(expert_actions, num_actions=actions))
        flown = [_fly(tasks, pilot, seed=seed, show_progress=show_progress) for pilot in pilots]
        seconds = actions / horizon.fps
        results.append(MissionResult(legs=count, seconds=seconds, policy=flown[0], expert=flown[1]))
    return MissionReport(
        model=policy.info.name,
        precision=policy.info.precision,
        missions=missions,
        seed=seed,
        results=tuple(results),
    )


def _fly(tasks: Sequence[Task], pilot: MissionPilot | ReplayPilot, *, seed: int, show_progress: bool) -> Outcome:
    @contextmanager
    def source() -> Iterator[MissionPilot | ReplayPilot]:
        yield pilot

    return outcome(evaluate(tasks, source, seed=seed, label="missions", show_progress=show_progress).rows[POLICY])


def mission_parts(report: MissionReport) -> list[Part]:
    """Sentences and a table, for `bench_table.render`."""
    rows = []
    for result in report.results:
        for name, flown in (("policy", result.policy), ("expert", result.expert)):
            low, high = flown.success_interval
            rows.append(
                (
                    str(result.legs),
                    f"{result.seconds:g}",
                    name,
                    f"{flown.success_rate:.1%}",
                    f"{low:.0%} to {high:.0%}",
                    f"{flown.mean_distance_m:.2f}",
                    f"{flown.mean_yaw_error_deg:.1f}",
                )
            )
    return [
        f"{report.model} {report.precision}: {report.missions} missions a row, each one chained session. Success: the "
        "end lies within 1.5 m and 15 degrees of the expert's, without a collision on the whole way; 95 % intervals.",
        Table(("legs", "seconds", "flown by", "success", "95 %", "distance m", "yaw deg"), tuple(rows)),
    ]
