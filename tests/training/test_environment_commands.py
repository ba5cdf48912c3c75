"""`sim serve` and `sim bench`."""

import http.client
import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.training.environments import bench
from worldvln_edge.training.environments.bench import BenchError, bench_table
from worldvln_edge.training.environments.environment import EnvironmentFault


def test_command_serves_until_sigterm(tmp_path):
    command = [sys.executable, "-m", "worldvln_edge", "sim", "serve", "--port", "0", "--tasks", str(tmp_path)]
    options = ["--processes", "2", "--per-process", "3", "--lease", "60", "--max-frame-side", "700"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        ready = process.stderr.readline()
        assert ready.startswith("the simulator is ready at http://127.0.0.1:")
        connection = http.client.HTTPConnection("127.0.0.1", int(ready.rpartition(":")[2]), timeout=30)
        connection.request("GET", "/v1/env/health")
        health = json.loads(connection.getresponse().read())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert (health["status"], health["capacity"], health["free"], health["lease_s"]) == ("ok", 6, 6, 60)
    assert (health["processes"], health["processes_running"], health["max_frame_side"]) == (2, 2, 700)


def test_serving_beyond_this_machine_needs_a_key_or_a_flag():
    refused = CliRunner().invoke(cli.main, ["sim", "serve", "--host", "0.0.0.0"])
    assert refused.exit_code == 1
    assert refused.output.startswith("error: 0.0.0.0 can be reached from other machines")


@pytest.mark.slow
def test_bench_counts_the_steps_of_every_way():
    options = ["--processes", "1", "--environments", "2", "--image-size", "8", "--rounds", "1", "--json"]
    result = CliRunner().invoke(cli.main, ["sim", "bench", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["way"], row["processes"], row["steps"]) for row in rows] == [
        ("direct", 1, 32),
        ("local", 1, 32),
        ("http", 1, 32),
    ]
    assert all(row["steps_per_s"] == pytest.approx(32 / row["seconds"], rel=0.01) for row in rows)


def test_bench_table_has_a_line_for_every_row():
    row = bench.BenchRow(way="local", processes=2, environments=16, image_hw=(64, 64), steps=1536, seconds=1.0)
    assert bench_table([row]).splitlines()[1].split() == ["local", "2", "16", "64x64", "1536"]


def test_bench_does_not_count_what_failed():
    fault = EnvironmentFault(code="lost", message="it died")
    with pytest.raises(BenchError, match="an environment failed while it was measured: it died"):
        bench._refuse_faults([fault])
