"""What a calibration measures, keeps, and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_models import random_frames, save_random_checkpoint, tiny_config

from worldvln_edge.cli import main
from worldvln_edge.export.activation_recorder import ActivationRecorder
from worldvln_edge.export.calibrate import check_frames, collect
from worldvln_edge.export.calibration import ActivationStatistics, Calibration, CalibrationError, input_key
from worldvln_edge.export.calibration_flights import read_route_flights, read_shard_flights
from worldvln_edge.models.checkpoint_source import CheckpointChangedError, open_any

CONFIG = tiny_config()
KEY = "world_model.blocks.0.attn.q_proj.weight"


def flights(count: int) -> list[tuple[np.ndarray, str]]:
    frames = CONFIG.horizon.num_frames
    return [(np.stack(random_frames(CONFIG, frames, seed)), "fly forward 5 m") for seed in range(count)]


def built(channels: int = 4, **changes) -> Calibration:
    ones = torch.ones(channels)
    found = ActivationStatistics(
        **({"largest": 2.0, "robust": 1.5, "channel_largest": ones, "mean_abs": ones, "mean_square": ones} | changes)
    )
    return Calibration.build(
        {KEY: found}, config=CONFIG, checkpoint_sha256="ab" * 32, source="flights", flights=1, frames=9
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_random_checkpoint(folder, CONFIG)
    return folder


def test_recorder_equals_numpy_over_all_rows():
    x = np.random.default_rng(0).standard_normal((40, 500, 6)).astype(np.float32) * np.array([1, 2, 3, 4, 5, 0.0])
    recorder = ActivationRecorder(6)
    for part in x:
        recorder(torch.nn.Identity(), (torch.from_numpy(part.astype(np.float32))[None],))
    found = recorder.statistics(KEY)
    rows = np.abs(x.reshape(-1, 6))
    np.testing.assert_allclose(found.mean_abs, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean_square, (rows**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.channel_largest, rows.max(0), rtol=1e-6)
    assert found.largest == pytest.approx(rows.max(), rel=1e-6)
    assert found.robust == pytest.approx(np.quantile(rows, 0.9999), rel=0.03)
    assert found.robust < found.largest


def test_flights_measure_every_shared_input_once(checkpoint: Path):
    source = open_any(checkpoint)
    done: list[tuple[int, int]] = []
    calibration = collect(
        source, flights(2), frames_from="test flights", progress=lambda what, at, total: done.append((at, total))
    )
    depth = CONFIG.world_model.depth
    assert len(calibration.inputs) == 4 * depth
    assert done[-1] == (4 * depth - 1, 4 * depth)  # two flights with two rows each
    assert calibration.description.flights == 2
    assert calibration.description.frames == 2 * CONFIG.horizon.num_frames
    for key in source.infos:
        if key.startswith("world_model.block") and key.endswith("_proj.weight"):
            assert input_key(key) in calibration.inputs
    assert collect(source, flights(2), frames_from="test flights").sha256 == calibration.sha256


def test_saved_calibration_comes_back_whole(tmp_path: Path):
    calibration = built()
    calibration.save(tmp_path / "a.calibration")
    loaded = Calibration.load(tmp_path / "a.calibration")
    assert loaded.description == calibration.description
    assert loaded.sha256 == calibration.sha256
    assert torch.equal(loaded.inputs[KEY].mean_square, calibration.inputs[KEY].mean_square)
    loaded.check_model(CONFIG, "ab" * 32)


def test_another_model_is_refused():
    calibration = built()
    with pytest.raises(CalibrationError, match="configuration is not that of"):
        calibration.check_model(tiny_config(name="other", repetitions=1), "ab" * 32)
    with pytest.raises(CalibrationError, match="measured on checkpoint abababababab, this one is cdcd"):
        calibration.check_model(CONFIG, "cd" * 32)
    with pytest.raises(CalibrationError, match="no statistics of world_model"):
        calibration.of("world_model.blocks.9.attn.q_proj.weight", 4)
    with pytest.raises(CalibrationError, match=r"has 4 channels for .* the weight reads 8"):
        calibration.of(KEY.replace("q_proj", "v_proj"), 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_numbers_that_are_not_finite_or_zero_are_refused(value: float):
    with pytest.raises(CalibrationError, match="were zero, NaN or infinite"):
        built(largest=value, robust=value)


def test_nothing_measured_is_refused(checkpoint: Path):
    with pytest.raises(CalibrationError, match="no activation was measured on nowhere"):
        collect(open_any(checkpoint), [], frames_from="nowhere")
    with pytest.raises(CalibrationError, match="no activation reached"):
        ActivationRecorder(4).statistics(KEY)
    with pytest.raises(CalibrationError, match="at least one flight"):
        Calibration.build({}, config=CONFIG, checkpoint_sha256="ab", source="nowhere", flights=0, frames=0)


def test_a_checkpoint_that_changes_meanwhile_is_refused(checkpoint: Path, tmp_path: Path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    source = open_any(folder)
    (folder / "label_stats.json").write_bytes((folder / "label_stats.json").read_bytes() + b" ")
    with pytest.raises(CheckpointChangedError, match=r"label_stats\.json was changed"):
        collect(source, flights(1), frames_from="test flights")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_here_is_refused(checkpoint: Path):
    with pytest.raises(CalibrationError, match="device cuda is not here"):
        collect(open_any(checkpoint), flights(1), frames_from="test flights", device="cuda")


@pytest.mark.parametrize("content", [b"", b"x" * 64, (2).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_calibration_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "wrong"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="is no calibration file"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "absent")


def test_frames_that_no_camera_took_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    with pytest.raises(CalibrationError, match="random noise"):
        check_frames(noise, "flight 0", at_least=9)
    with pytest.raises(CalibrationError, match="of one colour"):
        check_frames(np.full((9, 16, 24, 3), 7, np.uint8), "flight 0", at_least=9)
    with pytest.raises(CalibrationError, match="9 frames, the horizon needs 12"):
        check_frames(noise, "flight 0", at_least=12)
    with pytest.raises(CalibrationError, match="needed are uint8"):
        check_frames(noise.astype(np.float32), "flight 0", at_least=9)


def write_shard(folder: Path, name: str, first: int, count: int) -> None:
    frames = np.stack([np.stack(random_frames(CONFIG, 3, first + i)) for i in range(count)])
    np.savez(folder / name, frames=frames, instructions=np.array([f"flight {first + i}" for i in range(count)]))


def test_flights_are_drawn_from_all_shards_and_keep_their_text(tmp_path: Path):
    write_shard(tmp_path, "flights-0000000-0003.npz", 0, 3)
    write_shard(tmp_path, "flights-0000003-0002.npz", 3, 2)
    found = read_shard_flights(tmp_path, 5, seed=1)
    assert sorted(text for _, text in found) == [f"flight {i}" for i in range(5)]
    for frames, text in found:
        assert np.array_equal(frames, np.stack(random_frames(CONFIG, 3, int(text.split()[1]))))
    assert [t for _, t in read_shard_flights(tmp_path, 2, 4)] == [t for _, t in read_shard_flights(tmp_path, 2, 4)]
    with pytest.raises(CalibrationError, match="holds 5 flights, 6 are asked for"):
        read_shard_flights(tmp_path, 6, seed=0)
    (tmp_path / "flights-0000005-0001.npz").write_bytes(b"broken")
    with pytest.raises(CalibrationError, match="no shard of flights"):
        read_shard_flights(tmp_path, 1, seed=0)


def write_route(route: Path, meta: dict) -> list[np.ndarray]:
    (route / "images").mkdir(parents=True)
    (route / "meta.json").write_text(json.dumps(meta))
    frames = random_frames(CONFIG, 4)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(route / "images" / f"frame_{i:06d}.png")
    return frames


def test_routes_give_their_first_images_and_first_text_that_is_not_blank(tmp_path: Path):
    frames = write_route(tmp_path / "a", {"instruction": " ", "instruction_unified": "turn left"})
    [(found, text)] = read_route_flights(tmp_path, 1, seed=0, frames=3)
    assert text == "turn left"
    assert np.array_equal(found, np.stack(frames[:3]))
    write_route(tmp_path / "b", {"prompt": ""})
    with pytest.raises(CalibrationError, match="holds an instruction"):
        read_route_flights(tmp_path, 2, seed=0, frames=3)
    with pytest.raises(CalibrationError, match="holds no routes"):
        read_route_flights(tmp_path / "a", 1, seed=0, frames=3)


def test_command_writes_a_calibration_of_this_checkpoint(checkpoint: Path, tmp_path: Path):
    config = CONFIG
    folder = tmp_path / "flights"
    folder.mkdir()
    video = np.stack([frames for frames, _ in flights(2)])
    np.savez(folder / "flights-0000000-0002.npz", frames=video, instructions=np.array(["climb 5 m", "turn left"]))
    out = tmp_path / "tiny.calibration"
    arguments = ["calibrate", "--checkpoint", str(checkpoint), "--flights", str(folder), "--count", "2"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["flights"] == 2
    Calibration.load(out).check_model(config, open_any(checkpoint).fingerprint())
    both = CliRunner().invoke(main, [*arguments, "--simulate", "--out", str(out)])
    assert both.exit_code == 2
    assert "exactly one of" in both.output
