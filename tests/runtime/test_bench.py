"""`worldvln-edge bench`: what it flies, what it counts, what it prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from worldvln_edge import cli
from worldvln_edge.config import ConfigError
from worldvln_edge.presets import preset
from worldvln_edge.runtime.bench.bench import bench_bundle
from worldvln_edge.runtime.bench.bench_flight import BenchConfig, fly_segments, synthetic_frames
from worldvln_edge.runtime.bench.bench_plot import Bar, write_bar_plot
from worldvln_edge.runtime.bench.bench_report import quantiles
from worldvln_edge.runtime.bench.report_table import Table
from worldvln_edge.runtime.engines.engine_meter import EngineMeter
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

STAGES = {"preprocess", "vae_encoder", "quantiser", "text_encoder", "world_model_step", "vae_decoder", "action_decoder"}
QUICK = ["--threads", "1", "--frame-size", "32x24"]


def config(**changes) -> BenchConfig:
    return BenchConfig(**{"frame_hw": (24, 32), "threads": 1, "peak_seconds": 0.0, **changes})


@pytest.fixture(scope="module")
def report(tiny_bundle: Path):
    return bench_bundle(tiny_bundle, config(segments=6, warm_up_segments=2))


def test_flies_as_many_segments_as_asked_also_across_flights(tiny_bundle: Path):
    timings = list(fly_segments(load_policy(tiny_bundle, threads=1), config(segments=4, warm_up_segments=1)))
    assert [timing.segment for timing in timings] == [0, 1, 2, 0, 1]
    for timing in timings:
        assert timing.total_ms >= sum(timing.stages_ms.values()) > 0
        assert 0 < timing.readings.engine_ms < timing.total_ms
        assert timing.host_ms > 0


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


def test_bundle_is_flown_and_every_stage_is_counted(tiny_bundle: Path, report):
    assert (report.model, report.precision, report.backend, report.threads) == ("tiny", "fp32", "onnx", 1)
    assert report.actions_per_segment == 4
    sizes = {path.name: path.stat().st_size for path in tiny_bundle.iterdir() if path.name != "manifest.json"}
    assert report.bundle_bytes == sum(sizes.values())
    assert report.weight_bytes == report.bundle_bytes - sizes["tokenizer.json"]
    assert report.load_s > 0
    assert set(report.stages) == STAGES | {"world_model_context"}
    assert report.segment.runs == report.stages["world_model_step"].runs == 6
    assert report.stages["text_encoder"].runs == 2  # every flight has an instruction of its own
    for each in (report.segment, report.host, *report.stages.values()):
        assert 0 <= each.p50_ms <= each.p95_ms <= each.p99_ms
    assert report.host.p50_ms < report.segment.p50_ms
    assert report.rss_bytes is None or 0 < report.rss_bytes <= report.peak_rss_bytes


def test_work_of_a_segment_is_that_of_the_session(tiny_bundle: Path, report):
    policy = load_policy(tiny_bundle, threads=1)
    session = policy.new_session("move forward 5 meters")
    frames = synthetic_frames((24, 32), 9, 0)
    session.observe(frames[:1])
    first = session.counters
    assert [each.segment for each in report.segments] == [0, 1, 2]
    work = report.segments[0].work
    assert (work.token_steps, work.world_model_calls) == (first["token_steps"], first["world_model_calls"])
    assert (work.frames_encoded, work.latents_decoded) == (first["frames_encoded"], first["latents_decoded"])
    session.work_ahead()
    ahead = session.counters["token_steps"] - first["token_steps"]
    assert report.segments[0].work_ahead.token_steps == ahead > 0
    assert report.segments[2].work_ahead.token_steps == 0  # nothing follows the last segment
    assert all(each.work.io_bytes > 0 and each.work.kv_copied_bytes > 0 for each in report.segments)
    assert report.kv_bytes >= session.kv_bytes > 0
    assert report.kv_workspace_bytes == policy.workspace.size_bytes


def test_meters_count_bytes_of_the_host_and_change_no_action(tiny_bundle: Path):
    frames = synthetic_frames((24, 32), 1, 0)
    plain = load_policy(tiny_bundle, threads=1).new_session("go", seed=3).observe(frames)
    policy = load_policy(tiny_bundle, threads=1)
    meter = EngineMeter.around(policy)
    session = policy.new_session("go", seed=3)
    metered = session.observe(frames)
    np.testing.assert_array_equal(plain.actions, metered.actions)
    readings = meter.take()
    clip = policy.tables.schedule.clips[1]
    assert [step.thw for step in readings.steps] == [step.thw for step in clip.steps]
    # Text and the first frame's last scale are stored once, and nothing is put back.
    assert readings.kv_bytes == session.kv_bytes
    assert readings.io_bytes > sum(4 * policy.tables.no_bits(step).size for step in clip.steps)
    assert meter.take().engine_ms == 0


def test_rate_of_the_world_model_is_measured_against_the_machine(report):
    assert [rate.scale_hw for rate in report.steps] == [(1, 1), (1, 2), (2, 3)]
    assert [rate.calls for rate in report.steps] == [2 * 6, 2 * 6, 1 * 6]
    for rate in report.steps:
        assert rate.peak_share == pytest.approx(rate.flops / report.peak.matmul_flops)
    assert 0 < report.step_flops < report.peak.matmul_flops
    assert report.step_peak_share == pytest.approx(report.step_flops / report.peak.matmul_flops)


def test_quantiles_of_a_list():
    found = quantiles([float(ms) for ms in range(101)])
    assert (found.runs, found.p50_ms, found.p95_ms, found.p99_ms) == (101, 50, 95, 99)
    with pytest.raises(ValueError, match="nothing"):
        quantiles([])


def test_table_is_the_same_for_a_terminal_and_as_markdown():
    table = Table(("stage", "ms"), (("encode", "1.0"), ("a", "10.5")))
    assert table.text() == "stage     ms\nencode   1.0\na       10.5"
    assert table.markdown() == "| stage | ms |\n| --- | ---: |\n| encode | 1.0 |\n| a | 10.5 |"


def test_plot_shows_every_bar(tmp_path):
    write_bar_plot(tmp_path / "plot.png", "title", [Bar("0", {"vae_encoder": 30.0, "own": 10.0}), Bar("1", {"own": 5})])
    picture = np.asarray(Image.open(tmp_path / "plot.png"))
    encoder, own = ((picture == colour).all(-1).sum() for colour in ((0x0D, 0x94, 0x88), (0x57, 0x53, 0x4E)))
    assert encoder > 1.5 * own > 0
    with pytest.raises(ValueError, match=r"end the name with \.png"):
        write_bar_plot(tmp_path / "plot.txt", "title", [Bar("0", {"own": 1.0})])
    with pytest.raises(ValueError, match="at least one bar"):
        write_bar_plot(tmp_path / "plot.png", "title", [])


def test_command_prints_a_report_that_a_program_can_read(tiny_bundle: Path):
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *QUICK, "--segments", "2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["model"], report["segment"]["runs"], report["actions_per_segment"]) == ("tiny", 2, 4)
    assert report["stages"].keys() >= {"vae_encoder", "world_model_step", "action_decoder"}
    assert report["segments"][0]["work"]["world_model_calls"] > 0


def test_command_prints_tables_and_writes_them_and_a_plot(tiny_bundle: Path, tmp_path):
    files = ["--markdown", str(tmp_path / "new" / "bench.md"), "--plot", str(tmp_path / "bench.png")]
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *QUICK, "--segments", "3", *files])
    assert result.exit_code == 0, result.output
    first_words = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert first_words[0] == "tiny"
    assert set(first_words) >= STAGES | {"stage", "segment", "seconds", "outside", "bundle", "machine's", "2x3"}
    assert "(4 actions)" in result.stdout
    markdown = (tmp_path / "new" / "bench.md").read_text()
    assert "| world_model_step | 3 |" in markdown
    assert Image.open(tmp_path / "bench.png").width == 1000


def test_narrow_has_the_released_schedule_on_released_frames():
    narrow, released = preset("narrow"), preset("worldvln-8b")
    assert (narrow.schedule, narrow.horizon, narrow.image_hw) == (
        released.schedule,
        released.horizon,
        released.image_hw,
    )
    assert narrow.generation == released.generation
    assert narrow.video_vae.spatial_factors == released.video_vae.spatial_factors
    assert narrow.video_vae.temporal_factors == released.video_vae.temporal_factors
    with pytest.raises(ConfigError, match="narrow"):
        preset("wide")
