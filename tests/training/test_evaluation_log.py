"""Finished flights on disk: found again exactly when they are asked for, whole, whatever happened to the writer."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.flight_log import (
    FlightLog,
    FlightLogError,
    LoggedFlight,
    flight_digest,
    path_points,
)
from worldvln_edge.training.evaluation.flight_outcome import flight_outcome

TASK = Task(
    instruction="fly forward 2 m",
    initial_pos=(0, 0, 200, 0, 0, 0),
    end_pos=(200, 0, 200, 0, 0, 0),
    reference_path_raw=((0, 0, 200, 0, 0, 0), (200, 0, 200, 0, 0, 0)),
    task_id="t",
    kind="forward",
)
POSES = np.array([[0, 0, 200, 0, 0, 0], [120.06, 0, 200, 0, 0.123, 0]])


def logged(digest: str = "a") -> LoggedFlight:
    outcome = flight_outcome("policy", TASK, POSES, collided=False, instruction=TASK.instruction)
    return LoggedFlight(digest=digest, flight=outcome, path=path_points(POSES))


def test_what_was_appended_is_read_back(tmp_path):
    log = FlightLog(tmp_path / "new" / "flights.jsonl")
    assert log.read() == {}
    log.append(logged("a"))
    log.append(logged("b"))
    assert log.read() == {"a": logged("a"), "b": logged("b")}
    assert logged().path[1] == (120.1, 0.0, 200.0, 0.1)


def test_half_a_line_is_no_flight_and_the_next_writer_cuts_it_off(tmp_path):
    log = FlightLog(tmp_path / "flights.jsonl")
    log.append(logged("a"))
    with log.file.open("ab") as stream:
        stream.write(msgspec.json.encode(logged("b"))[:-20])
    assert set(log.read()) == {"a"}
    log.append(logged("c"))
    assert set(log.read()) == {"a", "c"}
    assert log.file.read_bytes().endswith(b"}\n")


def test_a_file_that_is_half_a_line_alone_starts_anew(tmp_path):
    log = FlightLog(tmp_path / "flights.jsonl")
    log.file.write_bytes(b'{"digest": "x')
    log.append(logged("a"))
    assert set(log.read()) == {"a"}


def test_several_processes_append_whole_lines(tmp_path):
    file, line = tmp_path / "flights.jsonl", tmp_path / "line.json"
    line.write_bytes(msgspec.json.encode(logged()))
    program = (
        "import msgspec, sys; from pathlib import Path\n"
        "from worldvln_edge.training.evaluation.flight_log import FlightLog, LoggedFlight\n"
        "one = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=LoggedFlight)\n"
        "for i in range(40):\n"
        "    FlightLog(Path(sys.argv[1])).append(msgspec.structs.replace(one, digest=sys.argv[3] + str(i)))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(file), str(line), name]) for name in "xy"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert set(FlightLog(file).read()) == {f"{name}{i}" for name in "xy" for i in range(40)}


def test_a_broken_line_is_named(tmp_path):
    log = FlightLog(tmp_path / "flights.jsonl")
    log.append(logged())
    log.file.write_bytes(log.file.read_bytes() + b"{}\n")
    with pytest.raises(FlightLogError, match=r"flights.jsonl, line 2: not a finished flight .*delete the line"):
        log.read()


def test_a_log_that_cannot_be_read_or_written_says_so(tmp_path):
    with pytest.raises(FlightLogError, match="cannot read the finished flights"):
        FlightLog(tmp_path).read()
    with pytest.raises(FlightLogError, match="cannot keep a finished flight"):
        FlightLog(tmp_path).append(logged())
    if Path("/dev/full").exists():
        with pytest.raises(FlightLogError, match="No space left on device"):
            FlightLog(Path("/dev/full")).append(logged())


def test_a_flight_is_named_by_all_that_it_depends_on():
    told = {"seed": 1, "identity": "x", "actions": np.zeros((2, 6))}
    first = flight_digest("policy", TASK, **told)
    assert first == flight_digest("policy", TASK, **dict(reversed(told.items())))
    others = [
        flight_digest("zero", TASK, **told),
        flight_digest("policy", msgspec.structs.replace(TASK, seed=1), **told),
        flight_digest("policy", TASK, **(told | {"seed": 2})),
        flight_digest("policy", TASK, **(told | {"identity": "y"})),
        flight_digest("policy", TASK, **(told | {"actions": np.ones((2, 6))})),
        flight_digest("policy", TASK, **(told | {"actions": np.zeros((3, 6))})),
    ]
    assert len({first, *others}) == len(others) + 1


def test_outcome_of_a_flight_measures_as_the_task_says():
    near = flight_outcome("policy", TASK, POSES, collided=False, instruction="x")
    assert (near.success, near.oracle_success, near.error) == (True, True, None)
    assert near.final_distance_m == pytest.approx(0.7994)
    assert near.spl == 1.0
    collided = flight_outcome("policy", TASK, POSES, collided=True, instruction="x")
    assert (collided.success, collided.oracle_success, collided.sdtw) == (False, False, 0.0)
    broken = flight_outcome("policy", TASK, POSES, collided=False, instruction="x", error="NaN")
    assert (broken.success, broken.oracle_success, broken.spl) == (False, True, 0.0)


def test_oracle_success_needs_place_and_heading_at_one_time():
    passed = np.array([[0, 0, 200, 0, 0, 0], [200, 0, 200, 0, 5, 0], [700, 0, 200, 0, 5, 0]])
    assert flight_outcome("policy", TASK, passed, collided=False, instruction="x").oracle_success
    turned = passed + np.array([0, 0, 0, 0, 40, 0])
    found = flight_outcome("policy", TASK, turned, collided=False, instruction="x")
    assert (found.oracle_success, found.oracle_distance_m) == (False, 0.0)
