"""Open-loop metrics: every stage of a checkpoint on recorded flights, and the tables that say which one limits."""

import json

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_models import save_random_checkpoint, tiny_config

from worldvln_edge.cli import main
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.runtime.bench.report_table import Table
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.data.simulator_flights import SimulatorFlights
from worldvln_edge.training.evaluation.open_loop import OpenLoopError, OpenLoopReport, measure_open_loop
from worldvln_edge.training.evaluation.open_loop_tables import chain_parts
from worldvln_edge.training.stages.flight_prediction import WorldModelPredictor
from worldvln_edge.training.stages.shuffled_flights import ShuffledFlights

FRAMES, FLIGHTS = 13, 4


def write_flights(folder, *, frames=FRAMES, count=FLIGHTS, split="validation"):
    """Shards as `sim flights` writes them, of moving gradients."""
    rng = np.random.default_rng(5)
    rows, cols = np.mgrid[0:16, 0:24]
    shift = np.arange(frames)[:, None, None] * rng.uniform(0.2, 1.5, count)[:, None, None, None]
    grey = 127 + 100 * np.sin(0.5 * rows + 0.3 * cols + shift)
    actions = np.zeros((count, frames - 1, 6), np.float32)
    actions[..., 0], actions[..., 4] = rng.uniform(5, 15, (count, frames - 1)), rng.normal(0, 3, (count, frames - 1))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / f"flights-{0:07d}-{count:04d}.npz",
        frames=np.repeat(grey[..., None], 3, -1).astype(np.uint8),
        actions=actions,
        instructions=np.array(["fly forward 5 m .", "turn left .", "climb .", "turn right to the red tower ."])[:count],
    )
    (folder / "flights.json").write_text(json.dumps({"count": count, "shard_flights": count, "split": split}))
    return folder


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    return write_flights(tmp_path_factory.mktemp("held-out"))


@pytest.fixture(scope="module")
def report(tiny_checkpoint, flights):
    return measure_open_loop(tiny_checkpoint, flights, seed=3, show_progress=False)


def test_every_stage_is_measured(report):
    assert (report.flights, report.split, report.seed) == (FLIGHTS, "validation", 3)
    assert report.vae["unexplained"] > 0
    assert 0 < report.backbone["majority_bit_ce"] <= 0.6932
    assert report.backbone["bit_ce"] > 0
    assert report.backbone["text_effect_error"] >= 0
    for metrics, prefix in (
        (report.action, "segment_"),
        (report.action, "predicted_"),
        (report.teacher_forced, "predicted_"),
        (report.rgb_head, "segment_"),
    ):
        assert metrics[f"{prefix}nmse_x"] > 0
        assert metrics[f"{prefix}endpoint_m"] > 0
    assert report.shuffled["nmse_x"] > 0
    assert "predicted_nmse_x" not in report.shuffled


def test_the_chain_differs_where_it_should(report):
    assert report.teacher_forced["predicted_nmse_x"] != report.action["predicted_nmse_x"]
    assert report.teacher_forced["segment_nmse_x"] == report.action["segment_nmse_x"]  # of the true latents
    assert report.shuffled["nmse_x"] != report.action["nmse_x"]


def test_report_survives_json(report):
    assert msgspec.json.decode(msgspec.json.encode(report), type=OpenLoopReport) == report


def test_adapter_is_measured_where_the_rgb_head_has_tokens_like_its(flights, report, tmp_path):
    config = tiny_config()
    heads = config.action_decoder
    like = msgspec.structs.replace(heads.latent_head, window=4)
    save_random_checkpoint(
        tmp_path,
        msgspec.structs.replace(config, action_decoder=msgspec.structs.replace(heads, rgb_head=like)),
    )
    (tmp_path / "run.json").write_text('{"adapter": {}, "action": {}}')
    found = measure_open_loop(tmp_path, flights, limit=2, show_progress=False)
    assert -1 <= found.adapter["cosine_worst"] <= found.adapter["cosine"] <= 1
    assert (found.is_adapter_distilled, report.is_adapter_distilled) == (True, False)
    values = {row[0]: row[1] for row in found.parts()[1].rows}
    assert values["adapter: cosine to the teacher"] == f"{found.adapter['cosine']:.3f}"
    assert report.adapter == {}  # the tiny model's heads differ in width


def test_same_seed_same_numbers(tiny_checkpoint, flights, report):
    again = measure_open_loop(tiny_checkpoint, flights, seed=3, show_progress=False)
    assert again == report


def test_tables_show_the_chain_and_what_the_list_asks(report):
    asked, chain, bits = (part for part in report.parts() if isinstance(part, Table))
    assert [row[0] for row in chain.rows] == [
        "training mean",
        "rgb head on real frames",
        "true latents",
        "teacher-forced scales",
        "predicted latents",
    ]
    assert all(len(row) == len(chain.header) for row in chain.rows)
    assert {row[0].partition(":")[0] for row in asked.rows} == {"vae", "sft", "adapter", "action", "control"}
    said = {row[0]: row[1] for row in asked.rows}
    assert said["adapter: cosine to the teacher"] == "trained with the action head, not distilled"
    assert said["sft: bit CE of few sequences, overfitted"] == "not measured"
    assert [row[0] for row in bits.rows[:3]] == ["all", "semantic", "detail"]


def test_metrics_that_are_missing_make_no_row():
    tables = [part for part in chain_parts({}, {}, {}, {}) if isinstance(part, Table)]
    assert [len(table.rows) for table in tables] == [1, 0]


def test_shuffled_frames_keep_all_but_their_order(flights):
    source = SimulatorFlights(flights, (16, 24))
    shuffled = ShuffledFlights(source)
    own, other = source.frames(1), shuffled.frames(1)
    assert not np.array_equal(own, other)
    assert sorted(frame.tobytes() for frame in own) == sorted(frame.tobytes() for frame in other)
    np.testing.assert_array_equal(shuffled.deltas(1), source.deltas(1))
    assert shuffled.key(1) != source.key(1)
    assert (len(shuffled), shuffled.frame_count(1), shuffled.name(1)) == (FLIGHTS, FRAMES, source.name(1))
    assert shuffled.instruction(1) == source.instruction(1)


def test_teacher_forced_scales_see_the_true_clip_and_drawn_ones_do_not(tiny_checkpoint):
    loaded = load_checkpoint(tiny_checkpoint)
    config, model = loaded.config, loaded.model
    tokenizer = PromptTokenizer.load(loaded.tokenizer_file, config.world_model.text_max_tokens)
    schedule = ScaleSchedule(config.schedule, 1 + (FRAMES - 1) // config.video_vae.temporal_stride)
    latents = torch.randn(1, config.world_model.latent_channels, schedule.latent_frames, *config.schedule.latent_hw)
    last = schedule.clips[-1].frame_slice
    changed = latents.clone()
    changed[:, :, last] = torch.randn_like(changed[:, :, last])

    def predict(given, *, is_teacher_forced):
        predictor = WorldModelPredictor(
            model.world_model, model.text_encoder, tokenizer, config, is_teacher_forced=is_teacher_forced
        )
        generator = torch.Generator().manual_seed(1)
        return predictor.predict(given, schedule, ["turn left ."], [generator]), predictor.digest("turn left .")

    drawn, drawn_digest = predict(latents, is_teacher_forced=False)
    forced, forced_digest = predict(latents, is_teacher_forced=True)
    assert drawn_digest != forced_digest
    assert not torch.equal(drawn, forced)
    torch.testing.assert_close(predict(changed, is_teacher_forced=False)[0], drawn)
    assert not torch.equal(predict(changed, is_teacher_forced=True)[0], forced)


def test_flights_that_do_not_fit_are_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(OpenLoopError, match=r"4 flights of \[17\] frames; .* needs at least 2 flights of 13 frames"):
        measure_open_loop(tiny_checkpoint, write_flights(tmp_path / "long", frames=17), show_progress=False)
    with pytest.raises(OpenLoopError, match="1 flights"):
        measure_open_loop(tiny_checkpoint, write_flights(tmp_path / "one", count=1), show_progress=False)


def test_command_measures_without_flying(tiny_checkpoint, flights, tmp_path):
    options = ("--checkpoint", tiny_checkpoint, "--open-loop", flights, "--open-loop-limit", 2, "--count", 0)
    result = CliRunner().invoke(main, ["eval", *map(str, options), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Open loop on 2 recorded flights of the split validation" in result.stdout
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["open_loop"]["flights"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "eval.md", "eval.html"}
    assert "teacher-forced scales" in (tmp_path / "eval.html").read_text()
