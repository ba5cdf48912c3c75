"""`worldvln-edge bench`: what it flies, what it counts, what it prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.runtime.bench import BenchConfig, bench_bundle, fly_segments, synthetic_frames
from worldvln_edge.runtime.null_policy import NullPolicy


def test_flies_as_many_segments_as_asked_also_across_flights():
    config = BenchConfig(segments=4, warm_up_segments=1, frame_hw=(24, 32))
    timings = list(fly_segments(NullPolicy(), config))
    assert len(timings) == 5
    for timing in timings:
        assert timing.segment_ms >= timing.stages_ms["generate"] >= 0


def test_frames_move_and_are_the_same_for_a_seed():
    frames = synthetic_frames((24, 32), 3, seed=1)
    again = synthetic_frames((24, 32), 3, seed=1)
    assert [frame.shape for frame in frames] == [(24, 32, 3)] * 3
    np.testing.assert_array_equal(frames, again)
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("bad", [{"segments": 0}, {"warm_up_segments": -1}, {"frame_hw": (0, 640)}])
def test_impossible_bench_is_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        BenchConfig(**bad)


@pytest.mark.parametrize("text", ["640", "640x", "x480", "0x480", "640x99999", "640x480x3"])
def test_bad_frame_size_is_wrong_usage(text, tmp_path):
    result = CliRunner().invoke(cli.main, ["bench", str(tmp_path), "--frame-size", text])
    assert result.exit_code == 2
    assert "for example 640x480" in result.output


def test_folder_that_is_no_bundle_is_one_line_and_exit_1(tmp_path):
    result = CliRunner().invoke(cli.main, ["bench", str(tmp_path)])
    assert result.exit_code == 1
    assert "is no bundle: manifest.json is missing" in result.output
    assert "Traceback" not in result.output


STAGES = {"preprocess", "vae_encoder", "quantiser", "text_encoder", "world_model_step", "vae_decoder", "action_decoder"}


def test_bundle_is_flown_and_every_stage_is_counted(tiny_bundle: Path):
    ticks = []
    config = BenchConfig(segments=4, warm_up_segments=2, frame_hw=(24, 32), threads=1)
    report = bench_bundle(tiny_bundle, config, on_segment=lambda: ticks.append(None))
    assert len(ticks) == 6
    assert (report.model, report.precision, report.backend, report.threads) == ("tiny", "fp32", "onnx", 1)
    assert report.actions_per_segment == 4
    assert report.bundle_bytes == sum(
        path.stat().st_size for path in tiny_bundle.rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    assert report.load_s > 0
    assert set(report.stages) == STAGES | {"world_model_context"}
    assert report.segment.runs == report.stages["world_model_step"].runs == 4
    assert report.stages["text_encoder"].runs == 1  # three segments a flight: only the fourth one starts another
    assert all(0 <= quantiles.p50_ms <= quantiles.p95_ms for quantiles in (report.segment, *report.stages.values()))
    assert report.rss_bytes is None or 0 < report.rss_bytes <= report.peak_rss_bytes


def test_command_prints_a_report_that_a_program_can_read(tiny_bundle: Path):
    options = ["--segments", "2", "--threads", "1", "--frame-size", "32x24", "--json"]
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["model"], report["segment"]["runs"], report["actions_per_segment"]) == ("tiny", 2, 4)
    assert report["stages"].keys() >= {"vae_encoder", "world_model_step", "action_decoder"}


def test_command_prints_a_table_with_every_stage_and_the_seconds_of_a_segment(tiny_bundle: Path):
    options = ["--segments", "3", "--threads", "1", "--frame-size", "32x24"]
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *options])
    assert result.exit_code == 0, result.output
    first_words = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert first_words[0] == "tiny"
    assert set(first_words) >= STAGES | {"stage", "segment", "seconds", "bundle"}
    assert "(4 actions)" in result.stdout
