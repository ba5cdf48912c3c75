"""Collections are flown in real simulator processes: they repeat, resume, survive faults, and count what was lost."""

import os
import shutil
import signal
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flight_files import files_no_larger_than
from rollout_world import PATIENT, CountingEnvironments, flier, flight_bytes, flight_tasks, tiny_policy

from worldvln_edge.config import ConfigError
from worldvln_edge.poses import integrate_actions
from worldvln_edge.training.environments.environment import CapacityError
from worldvln_edge.training.environments.pool import LocalEnvironments
from worldvln_edge.training.grpo import wave
from worldvln_edge.training.grpo.candidates import candidates_of
from worldvln_edge.training.grpo.collection import Collection, CollectionConfig, CollectionError
from worldvln_edge.training.grpo.fly_collection import collect
from worldvln_edge.training.grpo.trace import HORIZON, TraceError
from worldvln_edge.training.grpo.wave import LostFlight

TASKS, CONFIG = flight_tasks(2), CollectionConfig(candidates=3)


@pytest.fixture(scope="module")
def environments(one_thread):
    with LocalEnvironments(config=PATIENT) as pool:
        yield pool


@pytest.fixture(scope="module")
def flown(environments, tmp_path_factory) -> Path:
    """Two tasks with three candidates each, undisturbed."""
    folder = tmp_path_factory.mktemp("collections") / "flown"
    collect(folder, flier(environments), TASKS, CONFIG)
    return folder


def test_every_candidate_is_there_with_the_seed_and_the_poses_of_its_own_flight(flown):
    collection, policy = Collection(flown), tiny_policy()
    traces = list(collection.traces())
    assert [(trace.group_id, trace.candidate_id) for trace in traces] == [
        (f"task_00000{task}", candidate) for task in range(2) for candidate in range(3)
    ]
    for trace in traces:
        task = int(trace.group_id[-1])
        assert trace.seed == 20260320 + task * 1000003 + trace.candidate_id * 65537
        assert (trace.task_id, trace.prompt) == (TASKS[task].task_id, f"<<<t=3s>>>{TASKS[task].instruction}")
        assert (trace.checkpoint_digest, trace.end_reason, trace.collided) == (policy.digest, HORIZON, False)
        assert trace.latents.shape == (16, 1 + 2 + 2, 2, 3)
        assert trace.environment_steps == trace.horizon_steps == 12
        actions = np.concatenate([segment.actions for segment in trace.segments])
        expected = integrate_actions(np.array(TASKS[task].initial_pos), actions)
        np.testing.assert_allclose(trace.flown_poses()[1:], expected, atol=1e-9)
        np.testing.assert_array_equal(trace.completed_poses(), trace.flown_poses())
        for before, after in zip(trace.segments, trace.segments[1:], strict=False):
            np.testing.assert_array_equal(before.poses[-1], after.poses[0])
    assert len({trace.segments[0].log_prob for trace in traces}) == 6
    report = collection.report
    assert report.flights == report.flown_now == 6
    assert (report.environment_steps, report.environment_steps_saved) == (72, 0)
    assert (report.ended, report.failed, collection.lost()) == ({HORIZON: 6}, (), [])
    assert report.steps_per_second > 0


def test_the_same_seeds_give_the_same_files_however_the_flights_are_put_together(flown, environments, tmp_path):
    collect(tmp_path / "again", flier(environments, waves=3), TASKS, CONFIG)
    assert flight_bytes(tmp_path / "again") == flight_bytes(flown)


def test_another_first_seed_gives_other_flights(flown, environments, tmp_path):
    collect(tmp_path / "other", flier(environments), TASKS[:1], CollectionConfig(candidates=1, first_seed=5))
    (trace,) = Collection(tmp_path / "other").traces()
    same = next(Collection(flown).traces())
    assert trace.seed == 5
    assert any(not torch.equal(a, b) for a, b in zip(trace.segments[0].bits, same.segments[0].bits, strict=True))


def test_a_collection_that_was_broken_off_is_gone_on_with(flown, environments, tmp_path):
    seen, folder = [], tmp_path / "broken"
    broken = collect(
        folder, flier(environments), TASKS, CONFIG, on_flight=seen.append, should_stop=lambda: len(seen) == 4
    )
    assert broken is None
    assert len(flight_bytes(folder)) == 4
    assert environments.in_use == 0
    with pytest.raises(CollectionError, match=r"holds no complete collection \(collection.json is missing\)"):
        Collection(folder)
    (folder / "flights" / "task_000000_k01.safetensors").write_bytes(b"cut short")
    # As a process leaves it that is killed between writing a trace and giving it its name.
    whole = (folder / "flights" / "task_000000_k00.safetensors").read_bytes()
    (folder / "flights" / ".task_000000_k00.x1.safetensors").write_bytes(whole)
    counted = CountingEnvironments(environments)
    collection = collect(folder, flier(counted), TASKS, CONFIG)
    assert counted.steps == 3 * 12
    assert collection.report.flown_now == 3
    assert flight_bytes(folder) == flight_bytes(flown)


def test_a_half_written_trace_is_no_flight(flown, tmp_path):
    shutil.copytree(flown, tmp_path / "copy")
    (tmp_path / "copy" / "flights" / ".task_000000_k00.x1.safetensors").write_bytes(b"")
    assert len(list(Collection(tmp_path / "copy").traces())) == 6


def test_a_complete_collection_is_not_flown_again(flown, environments):
    counted, before = CountingEnvironments(environments), flight_bytes(flown)
    assert len(collect(flown, flier(counted), TASKS, CONFIG)) == 6
    assert counted.step_calls == 0
    assert flight_bytes(flown) == before


def test_a_killed_simulator_loses_one_flight_which_is_flown_again_with_another_seed(flown, environments, tmp_path):
    def kill_one(call: int, ids: list[str]) -> None:
        if call == 2:
            os.kill(environments.pids[0], signal.SIGKILL)

    folder = tmp_path / "killed"
    collection = collect(folder, flier(CountingEnvironments(environments, kill_one), waves=1), TASKS, CONFIG)
    lost = collection.lost()
    assert [(attempt.code, attempt.attempt) for attempt in lost] == [("lost", 0)]
    assert (collection.report.flights, collection.report.lost_attempts) == (6, len(lost))
    names = {f"{attempt.name}.safetensors" for attempt in lost}
    undisturbed, disturbed = flight_bytes(flown), flight_bytes(folder)
    assert {name for name in undisturbed if undisturbed[name] != disturbed[name]} == names
    seeds = {f"{trace.group_id}_k{trace.candidate_id:02d}.safetensors": trace.seed for trace in collection.traces()}
    assert {name: seeds[name] for name in names} == {f"{one.name}.safetensors": one.seed + 9973 for one in lost}
    assert environments.in_use == 0


def test_a_candidate_that_is_lost_each_time_is_listed_and_the_others_go_on(environments, tmp_path):
    homeless = flight_tasks(2, scene=None)[1:]
    collection = collect(
        tmp_path / "half", flier(environments), [TASKS[0], *homeless], CollectionConfig(candidates=1, retries=2)
    )
    assert collection.report.failed == ("task_000001_k00",)
    assert [(one.code, one.attempt, one.seed) for one in collection.lost()] == [
        ("bad_task", attempt, 20260320 + 1000003 + attempt * 9973) for attempt in range(3)
    ]
    assert [trace.task_id for trace in collection.traces()] == ["ahead-0"]


def test_a_collection_without_a_single_flight_fails(environments, tmp_path):
    homeless = flight_tasks(1, scene=None)
    config = CollectionConfig(candidates=2, retries=1)
    expected = r"not one of 2 candidates could be flown, 4 attempts were lost; the last one: bad_task: .*Mend that"
    for _ in range(2):  # what was given up is not tried again
        with pytest.raises(CollectionError, match=expected):
            collect(tmp_path / "none", flier(environments), homeless, config)


def test_a_policy_that_says_no_numbers_loses_its_flights_with_the_reason(environments, tmp_path):
    policy = tiny_policy()
    policy.model.latent_head.tsformer.head.bias.fill_(float("nan"))
    with pytest.raises(CollectionError, match="not_finite: actions or log-probabilities of segment 0 hold NaN"):
        collect(tmp_path / "nan", flier(environments, policy=policy), TASKS[:1], CollectionConfig(candidates=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "without 1 frames of 16x24 and poses"),
        ({"frames": np.zeros((1, 8, 8, 3), np.uint8)}, "without 1 frames of 16x24 and poses"),
        ({"poses": np.full((1, 6), np.nan)}, "poses with NaN or infinity"),
    ],
)
def test_an_answer_that_does_not_fit_loses_its_flight_only(environments, change, message):
    class Damaged(CountingEnvironments):
        def reset(self, ids):
            answers = dict(super().reset(ids))
            answer = answers.pop(ids[0])
            return answers if change is None else {**answers, ids[0]: replace(answer, **change)}

    waiting = deque(candidates_of(TASKS[:1], 2))
    with closing(flier(Damaged(environments)).fly(waiting)) as outcomes:
        lost, trace = sorted(outcomes, key=lambda one: not isinstance(one, LostFlight))
    assert (lost.code, lost.message) == ("bad_answer", f"the environment answered {message}")
    assert trace.candidate_id == 1


def test_an_error_of_the_environments_as_a_whole_ends_the_run_and_gives_them_back(environments, tmp_path):
    def fail(call: int, ids: list[str]) -> None:
        if call == 2:
            raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError, match="the server is gone"):
        collect(tmp_path / "gone", flier(CountingEnvironments(environments, fail)), TASKS, CONFIG)
    assert environments.in_use == 0


def test_a_wave_waits_until_others_give_environments_back(flown, environments, tmp_path):
    others = [f"other-{index}" for index in range(environments.capacity - 3)]
    assert environments.create(dict.fromkeys(others, TASKS[0]), image_hw=(16, 16)) == {}
    refusals = []

    class Shared(CountingEnvironments):
        def create(self, tasks, **options):
            try:
                return super().create(tasks, **options)
            except CapacityError as error:
                refusals.append(error)
                environments.close(others)
                raise

    collect(tmp_path / "shared", flier(Shared(environments)), TASKS, CONFIG)
    assert len(refusals) == 1
    assert flight_bytes(tmp_path / "shared") == flight_bytes(flown)


def test_who_waits_too_long_for_room_hears_of_it(environments, monkeypatch, tmp_path):
    monkeypatch.setattr(wave, "_ROOM_WITHIN_S", 0.1)
    others = [f"other-{index}" for index in range(environments.capacity)]
    assert environments.create(dict.fromkeys(others, TASKS[0]), image_hw=(16, 16)) == {}
    try:
        with pytest.raises(CapacityError, match="4 environments were asked for and 0 of 8 are free"):
            collect(tmp_path / "full", flier(environments), TASKS, CONFIG)
    finally:
        environments.close(others)


def test_a_folder_of_another_collection_is_refused(flown, environments):
    with pytest.raises(CollectionError, match="begun with another collection; give the same options"):
        collect(flown, flier(environments), TASKS, CollectionConfig(candidates=4))
    with pytest.raises(CollectionError, match="begun with another policy_scales, another tasks_digest, another tasks;"):
        collect(flown, flier(environments, policy=tiny_policy(policy_scales="all")), TASKS[:1], CONFIG)


def test_a_folder_that_another_process_writes_is_refused(environments, tmp_path):
    seen = []

    def collect_beside(outcome) -> None:
        with pytest.raises(CollectionError, match="is being collected into by another process; wait for it to end"):
            collect(tmp_path / "one", flier(environments), TASKS[:1], CONFIG)
        seen.append(outcome)

    collect(tmp_path / "one", flier(environments), TASKS[:1], CONFIG, on_flight=collect_beside)
    assert len(seen) == 3


def test_a_full_disk_ends_the_run_and_what_was_written_stays(flown, environments, tmp_path):
    folder = tmp_path / "full"
    size = max(len(one) for one in flight_bytes(flown).values())
    with files_no_larger_than(size // 2), pytest.raises(TraceError, match="make room, or put the collection elsewhere"):
        collect(folder, flier(environments), TASKS, CONFIG)
    assert environments.in_use == 0
    assert list((folder / "flights").iterdir()) == []
    collect(folder, flier(environments), TASKS, CONFIG)
    assert flight_bytes(folder) == flight_bytes(flown)


def test_a_folder_that_cannot_be_made_is_named(environments, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CollectionError, match=r"file/run: cannot be written .*; give another folder"):
        collect(tmp_path / "file" / "run", flier(environments), TASKS, CONFIG)


def test_damaged_files_of_a_collection_say_what_to_do(flown, tmp_path):
    for name, content in (("settings.json", b"{}"), ("collection.json", b"["), ("lost.jsonl", b"{")):
        folder = tmp_path / name
        folder.mkdir()
        for kept in ("settings.json", "collection.json"):
            (folder / kept).write_bytes((flown / kept).read_bytes())
        (folder / name).write_bytes(content)
        expected = "delete it, and they count as 0" if name == "lost.jsonl" else "collect into a new folder"
        with pytest.raises(CollectionError, match=f"{name}: .*{expected}"):
            Collection(folder).lost()


def test_impossible_numbers_are_refused(environments):
    with pytest.raises(ConfigError, match="candidates >= 1 and retries >= 0, found 0 and 3"):
        CollectionConfig(candidates=0)
    with pytest.raises(ConfigError, match="waves must be >= 1, found 0"):
        flier(environments, waves=0)
    with pytest.raises(ValueError, match="a collection needs tasks and candidates of each, found 0 tasks"):
        collect(Path("nowhere"), flier(environments), [], CONFIG)
    assert not Path("nowhere").exists()
