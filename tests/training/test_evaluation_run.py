"""`worldvln-edge eval`: what is kept, what is counted, what is compared, and what stands in the files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.poses import integrate_actions
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.policy import ActionChunk, NonFiniteActionsError
from worldvln_edge.training.evaluation.baselines import read_action_tables
from worldvln_edge.training.evaluation.bundle_source import SOURCE_FILE, bundle_source
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    PolicyPilot,
    ReplayPilot,
    SceneSimulators,
    expert_actions,
    fly_task,
)
from worldvln_edge.training.evaluation.evaluation import evaluate
from worldvln_edge.training.evaluation.evaluation_page import evaluation_page, failures_first
from worldvln_edge.training.evaluation.evaluation_tables import against_parts, evaluation_markdown, evaluation_parts
from worldvln_edge.training.evaluation.flight_log import FlightLog
from worldvln_edge.training.evaluation.pilot_sources import BundlePilot
from worldvln_edge.training.evaluation.policy_choice import choose_checkpoint, choose_other
from worldvln_edge.training.evaluation.rgb_replay import has_rgb_head, open_rgb_replay
from worldvln_edge.training.evaluation.row_flights import POLICY, RGB, TEACHER_FORCED
from worldvln_edge.training.sim.flights import FlightsConfig, generate_flights
from worldvln_edge.training.sim.tasks import generate_task

SMALL = (16, 16)


class FailingPolicy(NullPolicy):
    """NaN in the second segment of flights with certain seeds; counts the segments that it was asked for."""

    def __init__(self, failing_seeds=()):
        super().__init__(image_hw=SMALL)
        self.failing_seeds, self.asked = failing_seeds, 0

    def new_session(self, prompt, *, seed, **options):
        session = super().new_session(prompt, seed=seed, **options)
        observe, fails = session.observe, seed in self.failing_seeds

        def counted(frames, **options):
            self.asked += 1
            chunk = observe(frames, **options)
            if fails and chunk is not None and chunk.segment == 1:
                raise NonFiniteActionsError(chunk)
            return chunk

        session.observe = counted
        return session


class ForwardPolicy(NullPolicy):
    """Ten centimetres forward a step, whatever it sees."""

    def new_session(self, prompt, *, seed, **options):
        session = super().new_session(prompt, seed=seed, **options)
        observe = session.observe

        def forward(frames, **options):
            chunk = observe(frames, **options)
            if chunk is None:
                return None
            actions = np.zeros_like(chunk.actions)
            actions[:, 0] = 10.0
            return ActionChunk(
                segment=chunk.segment, actions=actions, observed_frames=chunk.observed_frames, seed=chunk.seed
            )

        session.observe = forward
        return session


def opened(policy):
    return lambda: nullcontext(PolicyPilot(policy))


@pytest.fixture(scope="module")
def tasks():
    return [generate_task("test", index) for index in range(4)]


@pytest.fixture(scope="module")
def server():
    with BackgroundServer(NullPolicy(image_hw=SMALL)) as server:
        yield server


@pytest.fixture(scope="module")
def train_flights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    generate_flights(FlightsConfig(split="train", image_hw=(8, 8)), 18, folder, workers=1, show_progress=False)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, ["eval", *(str(argument) for argument in arguments)])


def one_sentence(result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


def test_a_flight_that_breaks_off_is_a_failure_where_the_drone_is(tasks):
    evaluation = evaluate(tasks, opened(FailingPolicy({tasks[1].seed})), show_progress=False)
    broken = evaluation.rows[POLICY][1]
    assert "segment 1: the model gave NaN" in broken.error
    assert (broken.success, broken.task) == (False, tasks[1].task_id)
    assert len(evaluation.paths[POLICY][1]) == 17  # the first segment was flown
    assert len(evaluation.paths[POLICY][0]) == 49
    record = evaluation.to_json()
    assert (record["rows"][POLICY]["all"].flights, record["rows"][POLICY]["all"].broken_off) == (4, 1)
    text = evaluation_markdown(evaluation, "failing")
    assert "1 flights broke off and count as failures" in text
    assert tasks[1].task_id in text
    assert failures_first(evaluation.rows[POLICY])[0] == 1


def test_an_error_of_the_server_that_is_about_the_flight_is_a_failure(tasks, tmp_path):
    with BackgroundServer(FailingPolicy({tasks[0].seed})) as server:
        result = invoke(
            *("--server", server.url, "--count", 2, "--workers", 1, "--no-baselines", "--out", tmp_path, "--json")
        )
    record = json.loads(result.stdout)
    assert record["rows"]["policy"]["all"]["broken_off"] == 1
    assert "nonfinite_actions" in record["flights"][0]["error"]


def test_finished_flights_are_taken_from_the_log_and_no_others(tasks, tmp_path):
    log, first = FlightLog(tmp_path / "flights.jsonl"), FailingPolicy()
    flown = evaluate(tasks[:2], opened(first), log=log, identity="a", show_progress=False)
    assert first.asked == 6
    again = FailingPolicy()
    more = evaluate(tasks, opened(again), log=log, identity="a", show_progress=False)
    assert (again.asked, more.from_log) == (6, 2)  # tasks 2 and 3 alone
    assert more.rows[POLICY][:2] == flown.rows[POLICY]
    assert more.paths[POLICY][:2] == flown.paths[POLICY]
    for changes in ({"identity": "b"}, {"seed": 1}, {"is_resumed": False}):
        other = FailingPolicy()
        evaluate(tasks[:2], opened(other), **({"log": log, "identity": "a", "show_progress": False} | changes))
        assert other.asked == 6


def test_a_killed_evaluation_goes_on_and_ends_as_if_nothing_had_happened(server, tmp_path):
    out, options = tmp_path / "killed", ("--count", "6", "--workers", "2", "--no-baselines", "--resume")
    command = [sys.executable, "-m", "worldvln_edge", "eval", "--server", server.url, *options, "--out", str(out)]
    log = out / "flights.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        give_up_s = time.monotonic() + 120
        while not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
            assert run.poll() is None or log.is_file(), "the evaluation ended without a flight"
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
    kept = [line for line in log.read_bytes().split(b"\n")[:-1]]
    resumed = json.loads(invoke("--server", server.url, *options, "--out", out, "--json").stdout)
    assert log.read_bytes().split(b"\n")[: len(kept)] == kept
    digests = [json.loads(line)["digest"] for line in log.read_text().splitlines()]
    assert len(digests) == len(set(digests)) == 6
    whole = json.loads(invoke("--server", server.url, *options, "--out", tmp_path / "whole", "--json").stdout)
    for record in (resumed, whole):
        for flight in record["flights"]:
            del flight["latency_ms"]
    assert resumed == whole


def test_the_files_hold_the_tables_and_a_page_that_needs_no_other(server, train_flights, tmp_path):
    result = invoke(
        *("--server", server.url, "--count", 2, "--workers", 1, "--train-flights", train_flights, "--out", tmp_path)
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "eval.json").read_text())
    policy = record["rows"]["policy"]["all"]
    for share in ("success", "oracle_success"):
        low, high = policy[f"{share}_interval"]
        assert 0 <= low <= policy[f"{share}_rate"] <= high <= 1
    for mean, interval in (
        ("mean_distance_m", "distance_interval_m"),
        ("mean_yaw_error_deg", "yaw_error_interval_deg"),
        *((name, f"{name}_interval") for name in ("spl", "ndtw", "sdtw")),
    ):
        low, high = policy[interval]
        assert low <= policy[mean] <= high
    assert record["rows"]["expert"]["all"]["ndtw"] == 1.0
    markdown, page = (tmp_path / "eval.md").read_text(), (tmp_path / "eval.html").read_text()
    assert "| row | flights | success | 95 % | oracle | SPL | nDTW | sDTW |" in markdown
    assert not re.findall(r"<script|<link|<img|@import|url\(|src=|href=|https?://", page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2 * 2  # from above, and height
    assert all(len(list(ET.fromstring(drawing))) > 2 for drawing in drawings)
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "eval.md", "eval.html", "flights.jsonl"}
    card = tmp_path / "card.md"
    card.write_text("<!-- card: flights -->\n<!-- /card: flights -->\n")
    filled = invoke("card", card, "--eval", tmp_path)
    assert filled.exit_code == 0, filled.output
    assert "2 held-out tasks in held-out scenes. A flight succeeds when it ends within 1.5 m" in card.read_text()
    assert "| mean per kind and magnitude | 2 |" in card.read_text()


def test_text_of_a_task_cannot_become_part_of_the_page(tasks):
    named = msgspec.structs.replace(tasks[0], instruction="<script>alert(1)</script>", task_id="<b>")
    evaluation = evaluate([named], opened(NullPolicy(image_hw=SMALL)), show_progress=False)
    page = evaluation_page("<i>", evaluation_parts(evaluation), evaluation)
    assert not re.findall(r"<script|<i>|<b>&lt;|<b><", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_policy_is_compared_with_another_and_with_its_finished_evaluation(server, tmp_path):
    options = ("--count", 4, "--workers", 1, "--no-baselines")
    with BackgroundServer(ForwardPolicy(image_hw=SMALL)) as other:
        both = invoke(*("--server", server.url, "--against", other.url, *options, "--out", tmp_path / "both", "--json"))
        alone = invoke("--server", other.url, *options, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    finished = invoke(
        *("--server", server.url, "--against", tmp_path / "alone", *options, "--out", tmp_path / "read", "--json")
    )
    first, second = json.loads(both.stdout), json.loads(finished.stdout)
    assert first["against"] == second["against"]
    everything = first["against"]["all"]
    assert everything["tasks"] == 4
    assert everything["paired"]["distance_gain_m"] != 0
    low, high = everything["paired"]["distance_gain_interval_m"]
    assert low <= everything["paired"]["distance_gain_m"] <= high
    assert set(first["against"]["by_kind"]) == set(first["rows"]["policy"]["by_kind"])
    assert f"Against {other.url}, task by task" in (tmp_path / "both" / "eval.md").read_text()
    assert "#d97706" in (tmp_path / "both" / "eval.html").read_text()  # the other one's path is drawn, too


def test_flights_of_a_server_are_taken_up_only_if_asked_for(tmp_path):
    policy = FailingPolicy()
    with BackgroundServer(policy) as server:
        common = ("--server", server.url, "--count", 1, "--workers", 1, "--no-baselines", "--out", tmp_path)
        for options, asked in (((), 3), (("--resume",), 3), ((), 6), (("--no-resume",), 9)):
            assert invoke(*common, *options).exit_code == 0
            assert policy.asked == asked


def test_a_policy_is_not_better_than_itself(tasks):
    flights = evaluate(tasks, opened(NullPolicy(image_hw=SMALL)), show_progress=False).rows[POLICY]
    table = against_parts(flights, flights, "itself")[1]
    assert table.rows[0][4:9] == ("+0.0", table.rows[0][5], "0", "0", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", "3"), "was flown with seed 0, this with 3; give --seed 0"),
        (("--count", "3"), "has no flight of task test-000002 (1 such)"),
    ],
)
def test_a_finished_evaluation_of_other_flights_is_refused(server, tmp_path, change, message):
    common = ("--server", server.url, "--workers", 1, "--no-baselines")
    assert invoke(*common, "--count", 2, "--out", tmp_path / "done").exit_code == 0
    result = invoke(*common, "--count", 2, "--against", tmp_path / "done", "--out", tmp_path / "new", *change)
    assert message in one_sentence(result)


def test_a_record_that_is_none_and_tasks_that_changed_are_refused(server, tmp_path):
    common = ("--server", server.url, "--workers", 1, "--no-baselines", "--count", 1)
    done, new = tmp_path / "done", tmp_path / "new"
    assert invoke(*common, "--out", done).exit_code == 0
    record = json.loads((done / "eval.json").read_text())
    record["flights"][0]["instruction"] = "fly to the moon"
    (done / "eval.json").write_text(json.dumps(record))
    assert "had another instruction then" in one_sentence(invoke(*common, "--against", done, "--out", new))
    (done / "eval.json").write_text("{}")
    assert "not the record of an evaluation" in one_sentence(invoke(*common, "--against", done, "--out", new))


def test_what_cannot_be_evaluated_is_named(server, tmp_path):
    assert "is no checkpoint folder" in one_sentence(invoke("--checkpoint", tmp_path, "--no-baselines"))
    nothing = invoke("--server", server.url, "--no-baselines", "--against", tmp_path, "--out", tmp_path / "o")
    assert "is nothing to compare with" in one_sentence(nothing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --bundle DIR, --checkpoint DIR and --server URL"),
        (("--bundle", "x", "--server", "ws://y"), "give one of --bundle DIR"),
        (("--bundle", "x", "--open-loop", "y"), "needs --checkpoint DIR"),
        (("--bundle", "x", "--count", "0"), "go with --open-loop DIR"),
        (("--server", "ws://x", "--profile", "fast"), "say how --bundle is flown"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_evaluating_a_server_needs_no_engine_and_no_torch():
    program = "import sys, worldvln_edge.training.evaluation.eval_run; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnxruntime", "matplotlib"} & set(loaded)


def dying_pilot():
    """A source whose process is killed, as by the system when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(tasks):
    with pytest.raises(FlightError, match=r"a worker process was killed .* run the same command again"):
        evaluate(tasks, dying_pilot, workers=2, show_progress=False)


def test_tasks_are_told_apart_by_their_names(tasks):
    with pytest.raises(FlightError, match="two tasks have one task_id"):
        evaluate([tasks[0], tasks[0]], opened(NullPolicy(image_hw=SMALL)), show_progress=False)
    with pytest.raises(FlightError, match="no tasks to fly"):
        evaluate([], opened(NullPolicy(image_hw=SMALL)), show_progress=False)


def test_the_rgb_head_flies_what_it_reads_from_the_experts_frames(tiny_bundle, tasks, tmp_path):
    """The tiny bundle flies 13 frames, so the tasks end there."""
    short = [
        msgspec.structs.replace(
            task, reference_path_raw=task.reference_path_raw[:13], end_pos=task.reference_path_raw[12]
        )
        for task in tasks[:2]
    ]
    log, source = FlightLog(tmp_path / "flights.jsonl"), BundlePilot(folder=tiny_bundle)
    options = {"rgb_bundle": tiny_bundle, "log": log, "identity": source.identity(), "show_progress": False}
    evaluation = evaluate(short, source, **options)
    assert list(evaluation.rows) == [POLICY, RGB]
    with open_rgb_replay(tiny_bundle) as head, SceneSimulators((16, 24)) as simulators:
        expert = ReplayPilot(expert_actions, num_actions=12)
        frames = fly_task(short[0], expert, simulators.for_task(short[0])).frames
        actions = head.actions(frames, (1, 5, 9, 13))
        shown_later = head.actions(np.concatenate([frames[:9], frames[9:][::-1]]), (1, 5, 9, 13))
    assert actions.shape == (12, 6)
    flown = np.array(evaluation.paths[RGB][0])[:, :3]
    poses = np.concatenate([[short[0].initial_pos], integrate_actions(np.array(short[0].initial_pos), actions)])
    np.testing.assert_allclose(flown, poses[:, :3], atol=0.06)
    np.testing.assert_array_equal(actions[:8], shown_later[:8])  # a segment sees its own frames and those before it
    assert not np.array_equal(actions[8:], shown_later[8:])
    again = evaluate(short, source, **options)
    assert (again.from_log, again.rows) == (4, evaluation.rows)


def test_teacher_forced_the_policy_sees_the_experts_flight_whatever_it_answers(tasks, train_flights):
    policy, seen = ForwardPolicy(image_hw=SMALL), []
    new_session = policy.new_session

    def watched(prompt, *, seed, **options):
        session = new_session(prompt, seed=seed, **options)
        seen.append([])
        observe = session.observe
        session.observe = lambda frames, **options: (seen[-1].extend(frames), observe(frames, **options))[1]
        return session

    policy.new_session = watched
    evaluation = evaluate(tasks[:1], opened(policy), tables=read_action_tables(train_flights), show_progress=False)
    with SceneSimulators(SMALL) as simulators:
        simulator = simulators.for_task(tasks[0])
        expert = fly_task(tasks[0], ReplayPilot(expert_actions, num_actions=48), simulator)
    closed_loop, teacher_forced = seen  # one task has no other one's text
    np.testing.assert_array_equal(np.stack(teacher_forced), expert.frames[:33])
    assert not np.array_equal(np.stack(closed_loop), expert.frames[:33])
    assert evaluation.paths[TEACHER_FORCED] == evaluation.paths[POLICY]  # this policy's actions are always the same
    forced = evaluation.rows[TEACHER_FORCED][0]
    assert (forced.latency_ms, forced.error) == ((), None)


def test_a_policy_that_breaks_off_teacher_forced_fails_there_too(tasks, train_flights):
    policy = FailingPolicy({tasks[0].seed})
    evaluation = evaluate(tasks[:1], opened(policy), tables=read_action_tables(train_flights), show_progress=False)
    assert "the model gave NaN" in evaluation.rows[TEACHER_FORCED][0].error
    assert len(evaluation.paths[TEACHER_FORCED][0]) == 1


def test_a_checkpoints_bundle_is_kept_and_its_rgb_head_is_found(tiny_checkpoint, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / SOURCE_FILE).write_text(json.dumps(bundle_source(tiny_checkpoint)))
    choice = choose_checkpoint(tiny_checkpoint, tmp_path / "bundle")
    assert (choice.name, choice.bundle) == (str(tiny_checkpoint), tmp_path / "bundle")
    assert has_rgb_head(choice.bundle)
    other = choose_other(str(tiny_bundle), tmp_path / "unused")
    assert other.source.identity() == choice.source.identity()
    assert replace(choice.source, profile="fast").identity() != choice.source.identity()
