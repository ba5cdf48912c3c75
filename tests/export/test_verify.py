"""`verify`: a faithful bundle passes, a wrong one does not, and the commands say so."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from small_models import save_random_checkpoint, tiny_config

from worldvln_edge.bundle import Bundle, file_entry, write_manifest
from worldvln_edge.cli import main
from worldvln_edge.export.verify import VerifyError, made_up_flight, verify_bundle
from worldvln_edge.images import transform

STAGES = [
    "text_encoder",
    "vae_encoder",
    "quantiser",
    "world_model",
    "vae_decoder",
    "vae_pixels",
    "action_head",
    "rgb_head",
    "actions",
    "flight",
]


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def rehash(bundle: Path, file: str) -> None:
    """Make the manifest agree with a changed file, so that only parity can find the change."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][file] = msgspec.to_builtins(file_entry(bundle / file))
    path.write_text(json.dumps(content))


def failed_stages(bundle: Path, checkpoint: Path) -> list[str]:
    return [row.stage for row in verify_bundle(bundle, checkpoint, flights=1) if row.failures]


def test_faithful_bundle_passes_every_stage(tiny_bundle: Path, tiny_checkpoint: Path):
    rows = verify_bundle(tiny_bundle, tiny_checkpoint, flights=2, seed=5)
    assert [row.stage for row in rows] == STAGES
    assert [row.failures for row in rows] == [[]] * len(STAGES)
    by_stage = {row.stage: row for row in rows}
    assert by_stage["actions"].action_cm is not None
    assert by_stage["quantiser"].bit_agreement == 1.0


def test_real_frames_may_be_given(tiny_bundle: Path, tiny_checkpoint: Path):
    frames = np.random.default_rng(3).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert not any(row.failures for row in verify_bundle(tiny_bundle, tiny_checkpoint, frames=frames, flights=1))
    with pytest.raises(VerifyError, match="5 frames given"):
        verify_bundle(tiny_bundle, tiny_checkpoint, frames=frames[:5])


def test_one_wrong_weight_is_found(own_bundle: Path, tiny_checkpoint: Path):
    graph = onnx.load(own_bundle / "action_head.onnx", load_external_data=False).graph
    tensor = max((t for t in graph.initializer if t.external_data), key=lambda t: np.prod(t.dims))
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (own_bundle / "weights.bin").open("r+b") as stream:
        stream.seek(int(place["offset"]))
        stream.write(np.float32(9.0).tobytes())
    rehash(own_bundle, "weights.bin")
    assert set(failed_stages(own_bundle, tiny_checkpoint)) >= {"action_head", "actions"}


def test_swapped_binding_is_found(own_bundle: Path, tiny_checkpoint: Path):
    model = onnx.load(own_bundle / "world_model_step.onnx", load_external_data=False)
    swap = {"past_key_0": "past_value_0", "past_value_0": "past_key_0"}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = swap.get(name, name)
    onnx.save_model(model, own_bundle / "world_model_step.onnx")
    rehash(own_bundle, "world_model_step.onnx")
    assert "world_model" in failed_stages(own_bundle, tiny_checkpoint)


def test_another_checkpoint_is_refused(tiny_bundle: Path, tmp_path: Path):
    save_random_checkpoint(tmp_path / "other", tiny_config(), seed=99)
    with pytest.raises(VerifyError, match="made from a checkpoint with sha256"):
        verify_bundle(tiny_bundle, tmp_path / "other")


def test_made_up_flight_moves_and_repeats():
    one, two = made_up_flight((16, 24), 3), made_up_flight((16, 24), 3)
    assert one[0].shape == (16, 24, 3)
    assert one[0].dtype == np.uint8
    np.testing.assert_array_equal(np.stack(one), np.stack(two))
    assert np.abs(one[1].astype(int) - one[0]).mean() > 0.5
    assert one[0].std() > 10


def test_verify_command_writes_the_table_into_the_manifest(own_bundle: Path, tiny_checkpoint: Path):
    result = CliRunner().invoke(main, ["verify", str(own_bundle), "--checkpoint", str(tiny_checkpoint), "--flights=1"])
    assert result.exit_code == 0, result.output
    assert all(stage in result.stdout for stage in STAGES)
    parity = Bundle.open(own_bundle).manifest.parity
    assert list(parity) == STAGES
    assert parity["actions"]["action_cm"] < 1e-2


def test_verify_command_exits_with_1_when_out_of_bounds(own_bundle: Path, tiny_checkpoint: Path):
    manifest = Bundle.open(own_bundle).manifest
    stats = msgspec.structs.replace(manifest.latent_head_stats, std_t=(9.0, 9.0, 9.0))
    write_manifest(own_bundle, msgspec.structs.replace(manifest, latent_head_stats=stats))
    result = CliRunner().invoke(
        main, ["verify", str(own_bundle), "--checkpoint", str(tiny_checkpoint), "--flights=1", "--json"]
    )
    assert result.exit_code == 1
    stages = json.loads(result.stdout)["stages"]
    assert stages["actions"]["failures"]
    assert not stages["action_head"]["failures"]


def test_frames_that_are_no_array_are_refused(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "frames.npy").write_bytes(b"not an array")
    result = CliRunner().invoke(
        main,
        ["verify", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--frames", str(tmp_path / "frames.npy")],
    )
    assert result.exit_code == 2
    assert "no .npy array" in result.output


def test_flight_that_treats_its_frames_differently_is_found(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    from worldvln_edge.runtime import worldvln_policy

    monkeypatch.setattr(worldvln_policy, "transform", lambda frame, hw: -transform(frame, hw)[:, :, ::-1])
    assert failed_stages(tiny_bundle, tiny_checkpoint) == ["flight"]
