"""Environments in simulator processes: exact, isolated from each other's deaths, and honest about what was lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from worldvln_edge.tasks import SceneRef, Task
from worldvln_edge.training.environments.environment import (
    CapacityError,
    EnvironmentFault,
    EnvironmentResult,
    FrameSizeError,
)
from worldvln_edge.training.environments.episode import Episode
from worldvln_edge.training.environments.frame_memory import FrameMemory, make_frame_memory
from worldvln_edge.training.environments.leases import LeasedEnvironments
from worldvln_edge.training.environments.pool import LocalEnvironments, PoolConfig
from worldvln_edge.training.environments.simulator_messages import (
    SPARE_VIEWS,
    Create,
    Look,
    Ready,
    Refused,
    Reset,
    SimulatorRequest,
    Step,
    WarmUp,
)
from worldvln_edge.training.environments.simulator_process import SimulatorStartError
from worldvln_edge.training.environments.simulator_worker import SimulatorWorker
from worldvln_edge.training.sim.simulator import Simulator
from worldvln_edge.training.sim.tasks import generate_task

HW = (24, 32)
START = (100.0, -50.0, 200.0, 0.0, 30.0, 0.0)


def a_task(scene: int = 0, **fields) -> Task:
    return Task(instruction="go", initial_pos=START, scene=SceneRef(family="rooms", seed=scene), **fields)


def some_actions(seed: int, count: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, (20, 5, 5, 0, 5, 0), (count, 6))


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalEnvironments]:
    with LocalEnvironments(config=PoolConfig(processes=2, per_process=20)) as environments:
        yield environments


@pytest.fixture
def pool(shared: LocalEnvironments) -> Iterator[LocalEnvironments]:
    yield shared
    shared.close(list(shared._seat_of))
    assert shared.in_use == 0


def seen(answer: object) -> EnvironmentResult:
    assert isinstance(answer, EnvironmentResult), answer
    return answer


def fault(answer: object) -> EnvironmentFault:
    assert isinstance(answer, EnvironmentFault), answer
    return answer


def wait_for(holds, within_s: float = 20.0) -> None:
    until_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_thirty_tasks_over_two_processes_equal_the_simulator_bit_for_bit(pool):
    tasks = {f"e{i}": generate_task("train", i, dynamics="tracked" if i // 8 % 2 else "kinematic") for i in range(30)}
    assert pool.create(tasks, image_hw=HW, max_frames=33) == {}
    first = pool.reset(list(tasks))
    rounds = [pool.step({id: some_actions(100 * i + k) for i, id in enumerate(tasks)}) for k in range(2)]
    assert len({pool._seat_of[id] for id in tasks}) == 2
    simulators: dict[object, Simulator] = {}  # one for each scene: making one costs more than a flight
    for i, (id, task) in enumerate(tasks.items()):
        key = task.scene, task.dynamics
        if key not in simulators:
            simulators[key] = Simulator.for_task(task, image_hw=HW)
        simulator = simulators[key]
        assert np.array_equal(seen(first[id]).frames, simulator.reset(task.initial_pos, task.seed)[None])
        for k, answers in enumerate(rounds):
            flown = [simulator.step(action) for action in some_actions(100 * i + k)]
            shown = seen(answers[id])
            assert np.array_equal(shown.frames, [each.frame for each in flown])
            assert np.array_equal(shown.poses, [each.pose for each in flown])
            assert shown.collided.tolist() == [each.collided for each in flown]
            assert (shown.frame_index, shown.done) == (17 + 16 * k, k == 1)
            assert shown.end_reason == (None, "horizon")[k]
    for simulator in simulators.values():
        simulator.close()


def test_killed_simulator_loses_the_episode_it_was_asked_for_and_the_others_go_on_where_they_were(pool):
    tasks = {f"e{i}": a_task(scene=i % 2) for i in range(6)}
    pool.create(tasks, image_hw=HW)
    pool.reset(list(tasks))
    pool.step({id: some_actions(0) for id in tasks})
    pid = pool.pids[0]
    os.kill(pid, signal.SIGKILL)
    answers = pool.step({id: some_actions(1) for id in tasks})
    (lost,) = (id for id in tasks if isinstance(answers[id], EnvironmentFault))
    assert fault(answers[lost]).code == "lost"
    assert f"simulator process {pid} was killed by signal 9; this episode is lost" in fault(answers[lost]).message
    assert fault(pool.reset([lost])[lost]).code == "lost"  # still, until it is created again
    assert pool.in_use == 5
    assert pid not in pool.pids
    assert pool.create({lost: tasks[lost]}, image_hw=HW) == {}
    pool.reset([lost])
    again = pool.step({lost: some_actions(0)})
    for id, task in tasks.items():
        with Simulator.for_task(task, image_hw=HW) as simulator:
            simulator.reset(START)
            expected = [[simulator.step(action) for action in some_actions(k)] for k in range(2)][id != lost]
        shown = seen(again[lost] if id == lost else answers[id])
        assert np.array_equal(shown.frames, [each.frame for each in expected])
        assert np.array_equal(shown.poses, [each.pose for each in expected])
        assert shown.frame_index == (17 if id == lost else 33)


def test_task_that_crashes_the_simulator_again_and_again_loses_itself_only(monkeypatch):
    with LocalEnvironments(processes=1) as pool:
        tasks = {id: a_task() for id in ("bad", "a", "b", "c")}
        pool.create(tasks, image_hw=HW)
        pool.reset(list(tasks))
        (seat,) = pool._seats
        ask = seat.process.ask

        def crash(request, within_s):
            if isinstance(request, Step) and request.id == "bad":
                os.kill(seat.process.pid, signal.SIGKILL)
            return ask(request, within_s)

        monkeypatch.setattr(seat.process, "ask", crash)
        for k in range(3):
            answers = pool.step({id: some_actions(k) for id in tasks})
            assert fault(answers.pop("bad")).code == "lost"
            assert {seen(each).frame_index for each in answers.values()} == {17 + 16 * k}
            assert pool.create({"bad": tasks["bad"]}, image_hw=HW) == {}
            pool.reset(["bad"])
        os.kill(pool.pids[0], signal.SIGKILL)
        assert fault(pool.reset(["a"])["a"]).code == "lost"
        pool.close(["b"])  # which the process that runs now has never made
        assert fault(pool.step({"b": some_actions(0)})["b"]).code == "unknown_environment"
        assert seen(pool.step({"c": some_actions(3)})["c"]).frame_index == 65


def test_hanging_simulator_is_killed_at_its_time_limit_and_the_others_answer():
    with LocalEnvironments(config=PoolConfig(processes=2, per_process=2)) as pool:
        tasks = {"a": a_task(0), "b": a_task(1)}
        pool.create(tasks, image_hw=HW)
        pool.reset(["a", "b"])
        pool.config = replace(pool.config, answer_within_s=2.0)
        hanging, healthy = pool._seat_of["a"].process.pid, pool._seat_of["b"].process.pid
        assert hanging != healthy
        os.kill(hanging, signal.SIGSTOP)
        answers = pool.step({id: some_actions(0) for id in tasks})
        assert fault(answers["a"]).code == "lost"
        assert "did not answer within 2 s and was killed" in fault(answers["a"]).message
        assert seen(answers["b"]).frame_index == 17
        assert hanging not in pool.pids
        with pytest.raises(ProcessLookupError):
            os.kill(hanging, 0)


def test_default_timeout_of_sockets_does_not_reach_a_simulator():
    """rospy sets one for its whole process."""
    socket.setdefaulttimeout(60)
    try:
        with LocalEnvironments(1) as pool:
            assert pool.create({"a": a_task()}, image_hw=HW) == {}
            seen(pool.reset(["a"])["a"])
    finally:
        socket.setdefaulttimeout(None)


def test_simulator_that_dies_between_calls_is_started_again_by_the_next_creation(pool):
    os.kill(pool.pids[0], signal.SIGKILL)
    os.kill(pool.pids[1], signal.SIGKILL)
    wait_for(lambda: all(seat.process._process.poll() is not None for seat in pool._seats))
    failed = pool.create({"a": a_task(0), "b": a_task(1)}, image_hw=HW)
    assert {fault(each).code for each in failed.values()} == {"lost"}
    assert pool.create({"a": a_task(0), "b": a_task(1)}, image_hw=HW) == {}


@pytest.mark.slow
def test_processes_end_with_their_owner():
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from worldvln_edge.training.environments.pool import LocalEnvironments as L\n"
            "import time; p = L(1); print(p.pids[0], flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        pid = int(owner.stdout.readline())
        owner.kill()

    def is_gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    wait_for(is_gone)


def test_more_than_fits_is_refused_as_a_whole(pool):
    pool.create({f"e{i}": a_task() for i in range(39)}, image_hw=HW)
    with pytest.raises(CapacityError, match="2 environments were asked for and 1 of 40 are free; nothing was created"):
        pool.create({"x": a_task(), "y": a_task()}, image_hw=HW)
    assert pool.in_use == 39
    assert pool.create({"x": a_task()}, image_hw=HW) == {}
    pool.close(["e0"])
    assert pool.create({"y": a_task(), "e1": a_task(1)}, image_hw=HW) == {}  # e1 is replaced, so it needs no room


@pytest.mark.parametrize("image_hw", [(1025, 64), (64, 1025), (0, 64)])
def test_frames_that_are_too_large_are_refused(pool, image_hw):
    with pytest.raises(FrameSizeError, match=rf"frames of {image_hw[0]}x{image_hw[1]} .* 1 to 1024 pixels a side"):
        pool.create({"a": a_task()}, image_hw=image_hw)
    with pytest.raises(FrameSizeError):
        pool.warm_up([a_task()], image_hw=image_hw)


def test_tasks_that_cannot_be_flown_fail_alone(pool):
    tasks = {
        "good": a_task(),
        "nowhere": Task(instruction="go", initial_pos=START, task_id="t"),
        "unknown": Task(instruction="go", initial_pos=START, scene=SceneRef(family="sea", seed=0)),
        "object": a_task(use_obj=3, obj_id=0, target_pos=START),
    }
    failed = pool.create(tasks, image_hw=HW)
    assert {id: each.code for id, each in failed.items()} == dict.fromkeys(("nowhere", "unknown", "object"), "bad_task")
    assert failed["nowhere"].message.startswith("task 't' names no scene")
    assert failed["unknown"].message.startswith("unknown scene family 'sea'")
    assert failed["object"].message == "use_obj must be 1 (a person) or 2 (a car), found 3"
    assert pool.in_use == 1


def test_environment_that_cannot_be_replaced_goes_on(pool):
    pool.create({"a": a_task()}, image_hw=HW)
    before = seen(pool.reset(["a"])["a"])
    assert pool.create({"a": Task(instruction="go", initial_pos=START)}, image_hw=HW)["a"].code == "bad_task"
    assert np.array_equal(seen(pool.reset(["a"])["a"]).frames, before.frames)
    pool.create({"a": a_task(scene=1)}, image_hw=(8, 8))
    assert seen(pool.reset(["a"])["a"]).frames.shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((0, 6)), "actions must be [n, 6] with n >= 1 (cm, deg), found nothing usable"),
        (np.zeros((2, 5)), "actions must be [n, 6] with n >= 1 (cm, deg), found [2, 5]"),
        (np.full((1, 6), np.nan), "actions must be finite numbers (cm, deg)"),
        ([["x"] * 6], "actions must be [n, 6] with n >= 1 (cm, deg), found nothing usable"),
    ],
)
def test_bad_actions_move_nothing(pool, actions, message):
    pool.create({"a": a_task()}, image_hw=HW)
    pool.reset(["a"])
    assert fault(pool.step({"a": actions})["a"]) == EnvironmentFault(code="bad_action", message=message)
    assert seen(pool.step({"a": np.zeros((1, 6))})["a"]).poses.tolist() == [list(START)]


def test_environment_that_is_not_there_or_not_reset_says_so(pool):
    pool.create({"a": a_task()}, image_hw=HW)
    answers = pool.step({"a": np.zeros((1, 6)), "b": np.zeros((1, 6))})
    assert fault(answers["a"]).message.endswith("reset the environment before its first step")
    assert fault(answers["b"]).code == "unknown_environment"
    assert "there is no environment 'b': it was never created, was closed" in fault(answers["b"]).message
    pool.close(["a", "b"])
    assert fault(pool.reset(["a"])["a"]).code == "unknown_environment"


def test_only_the_last_frame_is_rendered_on_request(pool):
    pool.create({"a": a_task(), "b": a_task()}, image_hw=HW)
    pool.reset(["a", "b"])
    each = seen(pool.step({"a": some_actions(1)})["a"])
    last = seen(pool.step({"b": some_actions(1)}, frames="last")["b"])
    assert last.frames.shape == (1, *HW, 3)
    assert np.array_equal(last.frames[0], each.frames[-1])
    assert np.array_equal(last.poses, each.poses)


def test_warming_up_asks_for_no_more_scenes_than_a_process_keeps(monkeypatch):
    asked: list[SimulatorRequest] = []
    with LocalEnvironments(processes=1) as environments:
        process = environments._seats[0].process
        monkeypatch.setattr(process, "ask", lambda request, within_s: (asked.append(request), Ready())[1])
        environments.warm_up([a_task(scene) for scene in range(SPARE_VIEWS + 3)], image_hw=(8, 8))
        assert environments.create({"a": a_task(0)}, image_hw=(8, 8)) == {}  # behind them
    assert [type(request) for request in asked] == [WarmUp] * SPARE_VIEWS + [Create]


def test_object_of_a_task_stands_in_its_scene_only(pool):
    ahead = (450.0, 150.0, 100.0, 0.0, 0.0, 0.0)
    pool.create({"with": a_task(use_obj=1, obj_id=2, target_pos=ahead), "without": a_task()}, image_hw=HW)
    answers = pool.reset(["with", "without"])
    assert not np.array_equal(seen(answers["with"]).frames, seen(answers["without"]).frames)
    with Simulator.for_task(a_task(), image_hw=HW) as simulator:
        assert np.array_equal(seen(answers["without"]).frames[0], simulator.reset(START))


def test_failure_of_one_episode_leaves_the_others_of_its_process(monkeypatch, capfd):
    worker = SimulatorWorker(make_frame_memory())
    for id in ("a", "b"):
        worker.answer(Create(id, a_task(), HW, 49, "trans_first"))
        assert isinstance(worker.answer(Reset(id)), Look)
    request = Step("a", np.zeros((1, 6)).tobytes(), "each")
    with monkeypatch.context() as patch:
        patch.setattr(Episode, "step", lambda *_: 1 / 0)
        refused = worker.answer(request)
    assert refused == Refused("simulator_failed", "the simulator failed; its stderr says why")
    assert isinstance(worker.answer(msgspec.structs.replace(request, id="b")), Look)
    worker.close()


def test_frame_memory_carries_larger_and_smaller_frames_after_each_other():
    owner = make_frame_memory()
    writer = FrameMemory(os.dup(owner.fd))
    kept = []
    for seed, shape in enumerate([(1, 2, 3, 3), (16, 64, 64, 3), (2, 5, 7, 3), (17, 64, 64, 3)]):
        frames = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        writer.write(frames)
        kept.append((frames, owner.read(shape)))
    assert all(np.array_equal(frames, read) for frames, read in kept)  # copies: what came later overwrote nothing
    writer.close()
    owner.close()


def test_machine_that_cannot_render_says_so_at_the_start(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(SimulatorStartError, match="cannot render offscreen with MUJOCO_GL=disabled"):
        LocalEnvironments(1)


@pytest.mark.parametrize("config", [{"processes": 0}, {"per_process": 0}, {"answer_within_s": 0.0}])
def test_pool_without_room_or_time_is_refused(config):
    with pytest.raises(ValueError, match="found"):
        PoolConfig(**config)
    with pytest.raises(ValueError, match="not both"):
        LocalEnvironments(1, PoolConfig())
    with pytest.raises(ValueError, match="found"):
        LocalEnvironments(0)


def test_environment_that_nobody_uses_is_given_back_after_its_lease(pool):
    now_s = 0.0
    leased = LeasedEnvironments(pool, idle_s=10.0, clock=lambda: now_s)
    leased.create({"used": a_task(), "left": a_task()}, image_hw=HW)
    assert (leased.capacity, leased.in_use) == (40, 2)
    now_s = 8.0
    leased.reset(["used"])
    now_s = 12.0
    assert leased.expire() == ["left"]
    assert pool.in_use == 1
    assert fault(leased.reset(["left"])["left"]).message.endswith("was left idle too long")
    seen(leased.step({"used": np.zeros((1, 6))})["used"])
    now_s = 30.0
    with leased._renewing(["used"]):
        assert leased.expire() == []  # a call is in progress
    leased.close(["used"])
    now_s = 60.0
    assert leased.expire() == []
    assert pool.in_use == 0
