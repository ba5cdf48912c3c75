"""`ros bench` measures with real processes; its bounds here are loose, for machines under load."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("cyclonedds", reason="needs the extra dds")

from worldvln_edge.cli import main


@pytest.mark.slow
def test_the_bench_kills_and_stops_a_policy_and_measures_holds_silence_and_recovery():
    arguments = ["ros", "bench", "--seconds", "3", "--repetitions", "1", "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["bundle"] is None
    assert figures["flown_s"] >= 2.5
    for blow in ("killed", "stopped"):
        [hold_ms], [silent_ms], [recovered_ms] = (
            figures[name][blow] for name in ("hold_ms", "silent_ms", "recovered_ms")
        )
        assert 0 <= hold_ms < silent_ms < 1500
        assert recovered_ms > 0
    assert 0 < figures["max_acceleration_m_s2"] <= figures["acceleration_limit_m_s2"] * 1.25
    assert figures["interval_ms"]["p50"] == pytest.approx(50, abs=5)


@pytest.mark.slow
def test_a_bundle_that_cannot_be_served_is_said_with_the_servers_own_words(tmp_path):
    result = CliRunner().invoke(main, ["ros", "bench", "--bundle", str(tmp_path), "--seconds", "1"])
    assert result.exit_code == 1
    assert "the server did not start" in result.output
    assert "manifest.json" in result.output
