"""A session in the Rerun viewer's own files: from a recording, and while it flies."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from recorded_flights import files, picture, recording_server

from worldvln_edge import cli
from worldvln_edge.client import SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

pytest.importorskip("rerun", reason="rerun-sdk takes 0.5 GB, so `make` leaves it out; pip install '.[rerun]'")

ENTITIES = ("/camera", "/world/path", "/world/plan", "/world/body", "/actions/dx", "/milliseconds/total", "/log")


def fly(server: BackgroundServer) -> None:
    with SessionClient(server.url, frame_format="rgb8") as client:
        client.start("fly forward 5 m")
        client.observe([picture(1)], poses=[(100.0, 0.0, 20.0, 0.0, 0.0, 0.0)])
        client.observe([picture(2, "PNG"), picture(3, "WEBP")])
        client.observe([np.full((8, 12, 3), 4, np.uint8)], prompt="turn left")
        client.end()


def check(path: Path, home: Path) -> None:
    """Rerun's own command reads the file, and finds in it what is shown."""
    command = [sys.executable, "-m", "rerun", "rrd", "print", path]
    printed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": str(home)}, check=True)
    assert {name for name in ENTITIES if f" - {name} - " in printed.stdout} == set(ENTITIES)


def test_recording_is_written_for_the_viewer(tmp_path):
    with recording_server(NullPolicy(), tmp_path, envelope=EnvelopeConfig(age_s=1e-9)) as server:
        fly(server)
    (path,) = files(tmp_path)
    result = CliRunner().invoke(cli.main, ["record", "show", str(path), "--save", str(tmp_path / "flight.rrd")])
    assert result.exit_code == 0, result.output
    check(tmp_path / "flight.rrd", tmp_path)


def test_another_reader_of_mcap_understands_every_topic(tmp_path):
    """Rerun reads MCAP itself, in Rust, and decodes Foxglove's messages."""
    from rerun.chunk import McapReader

    with recording_server(NullPolicy(), tmp_path, envelope=EnvelopeConfig(age_s=1e-9)) as server:
        fly(server)
    reader = McapReader(files(tmp_path)[0])
    topics = {channel.topic for channel in reader.info().channels}
    assert topics > {"/camera", "/camera/raw", "/actions", "/path", "/tf", "/log"}
    assert {str(chunk.entity_path) for chunk in reader.stream()} >= topics


def test_sessions_are_shown_while_they_fly(tmp_path):
    from worldvln_edge.runtime.recording.rerun_watcher import RerunWatcher

    policy = NullPolicy()
    viewer = RerunWatcher(policy.info, save_folder=tmp_path)
    with BackgroundServer(policy, watchers=[viewer.watch], envelope=EnvelopeConfig(age_s=1e-9)) as server:
        fly(server)
    viewer.close()
    (path,) = tmp_path.glob("*.rrd")
    check(path, tmp_path)
    assert viewer.lost_frames == 0


def test_viewer_that_fails_is_not_heard_of_in_flight(tmp_path, caplog):
    from worldvln_edge.runtime.recording.rerun_watcher import RerunWatcher

    policy = NullPolicy()
    viewer = RerunWatcher(policy.info, save_folder=tmp_path / "not there")
    with BackgroundServer(policy, watchers=[viewer.watch]) as server:
        fly(server)
    viewer.close()
    assert "nothing is sent to the Rerun viewer any more" in caplog.text


def test_two_ways_out_are_one_too_many(tmp_path):
    options = ["--save", str(tmp_path / "a.rrd"), "--connect", "rerun+http://127.0.0.1:9876/proxy"]
    result = CliRunner().invoke(cli.main, ["record", "show", "x.mcap", *options])
    assert result.exit_code == 2
    assert "--save or --connect, not both" in result.output
