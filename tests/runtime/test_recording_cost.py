"""`bench-record` flies with and without a recorder, and says what it adds."""

import json

import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.runtime.bench.recording_cost import RecordingCost
from worldvln_edge.runtime.bench.recording_cost_cli import recording_cost_table


def test_flights_are_counted_in_pairs(tiny_bundle):
    options = ["--pairs", "2", "--threads", "1", "--backend", "cpu", "--frame-size", "64x48", "--json"]
    result = CliRunner().invoke(cli.main, ["bench-record", str(tiny_bundle), *options])
    assert result.exit_code == 0, result.output
    cost = json.loads(result.stdout)
    for name in ("wall_ms", "recorded_wall_ms", "cpu_ms", "recorded_cpu_ms"):
        assert len(cost[name]) == 2
        assert min(cost[name]) > 0
    assert cost["lost_frames"] == 0
    assert cost["bytes_per_segment"] > 1000


def test_added_share_is_the_median_over_pairs():
    cost = RecordingCost(
        wall_ms=[100.0, 200.0, 100.0],
        recorded_wall_ms=[101.0, 240.0, 102.0],
        cpu_ms=[100.0, 100.0, 100.0],
        recorded_cpu_ms=[99.0, 100.0, 103.0],
        bytes_per_segment=5000.0,
    )
    assert (cost.wall_share, cost.cpu_share) == (pytest.approx(0.02), 0.0)
    table = recording_cost_table(cost)
    assert "wall time                     100.00    102.00    2.00%" in table
    assert "medians of 3 pairs of flights" in table
    assert "5 kB were written for a segment, 0 frames were lost" in table
