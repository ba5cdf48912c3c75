"""A random checkpoint has the released layout, opens like the released files, and is the same for the same seed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace
from safetensors.torch import load_file
from small_models import tiny_config
from transformers import T5EncoderModel

from worldvln_edge.atomic import FolderInUseError
from worldvln_edge.cli import main
from worldvln_edge.export.make_checkpoint import (
    ADAPTER,
    BACKBONE,
    DECODER,
    TSFORMER,
    VAE,
    MakeCheckpointError,
    make_checkpoint,
    plan,
    shards_of,
)
from worldvln_edge.export.random_weights import draw, pieces, plan_tensor
from worldvln_edge.models.action_decoder import LatentActionHead
from worldvln_edge.models.checkpoint_source import load_source, open_any
from worldvln_edge.models.released import load_world_model
from worldvln_edge.models.released_action import load_latent_head, read_combined_checkpoint
from worldvln_edge.models.released_vae import load_vae, read_vae_tensors, vae_for_actions
from worldvln_edge.models.stored_tensors import read_all
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.presets import preset
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer

NANO = preset("nano")


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "nano"
    make_checkpoint(NANO, folder, seed=7, shard_bytes=1_500_000)
    return folder


def layout_of(part) -> dict:
    return {tensor.key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in part}


def test_the_planned_files_of_the_released_model_have_the_released_layout(golden):
    planned = plan(preset("worldvln-8b"))
    assert layout_of(planned[BACKBONE]) == json.loads((golden("world_model") / "released_layout_8b.json").read_text())
    assert layout_of(planned[VAE]) == json.loads((golden("video_vae") / "released_layout_vae.json").read_text())
    action = json.loads((golden("action_decoder") / "released_layout_action_decoder.json").read_text())
    assert layout_of(planned[TSFORMER]) == action["model_state_dict"]
    assert layout_of(planned[ADAPTER]) == action["adapter_state_dict"]
    backbone_bytes = sum(tensor.size_bytes for tensor in planned[BACKBONE])
    assert backbone_bytes == pytest.approx(17.6e9, rel=0.01)
    shards = shards_of(planned[BACKBONE], 4_000_000_000)
    assert [tensor for shard in shards for tensor in shard] == planned[BACKBONE]
    assert max(sum(tensor.size_bytes for tensor in shard) for shard in shards) <= 4_000_000_000


def test_written_files_have_the_planned_layout(nano):
    planned = plan(NANO)
    stored = {key: t for shard in (nano / "backbone/gpt").glob("*.safetensors") for key, t in load_file(shard).items()}
    index = json.loads((nano / "backbone/gpt/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert len(set(index["weight_map"].values())) > 2
    vae = torch.load(nano / "vae.pth", weights_only=True)["vae"]
    action = read_combined_checkpoint(nano / "action_decoder.pt")
    for part, tensors in (
        (BACKBONE, stored),
        (VAE, vae),
        (TSFORMER, action.tsformer),
        (ADAPTER, action.adapter),
        (DECODER, action.vae),
    ):
        found = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in tensors.items()}
        assert found == layout_of(planned[part]), part
    assert vae["quantizer.lfq_semantic.mask"].tolist() == [2**i for i in reversed(range(16))]


def test_the_lazy_source_equals_the_eager_loaders(nano):
    source = open_any(nano)
    assert source.config == NANO
    assert source.missing_parts == {"rgb_head"}
    model = load_source(source).model
    expected = {key: t.shape for key, t in WorldVLN(NANO).state_dict().items() if not key.startswith("rgb_head.")}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == expected
    world = load_world_model(nano / "backbone", NANO.world_model, block_dtype=torch.float32)
    combined = read_combined_checkpoint(nano / "action_decoder.pt")
    head = LatentActionHead(NANO.action_decoder, NANO.video_vae.feature_channels)
    load_latent_head(head, combined)
    base = VideoVAE(NANO.video_vae)
    load_vae(base, read_vae_tensors(nano / "vae.pth"), "vae.pth")
    acting = vae_for_actions(base, read_all(combined.vae), "action_decoder.pt")
    text = T5EncoderModel.from_pretrained(nano / "text_encoder")
    for name, eager in (
        ("world_model", world),
        ("latent_head", head),
        ("text_encoder.t5", text),
        ("vae.encoder", base.encoder),
        ("vae.proj_down", base.proj_down),
        ("vae.decoder", acting.decoder),
        ("vae.proj_up", acting.proj_up),
    ):
        found = model.get_submodule(name).state_dict()
        assert found.keys() == eager.state_dict().keys(), name
        assert all(torch.equal(found[key], tensor) for key, tensor in eager.state_dict().items()), name
    assert not torch.equal(base.proj_up.weight, acting.proj_up.weight)


def test_activations_stay_finite(nano):
    source = open_any(nano)
    model = load_source(source).model
    ids = PromptTokenizer.load(source.tokenizer_file, NANO.world_model.text_max_tokens).encode("fly to the red tower.")
    assert ids.max() < NANO.text_encoder.vocabulary
    assert ids[-1] == 1
    with torch.no_grad():
        assert model.text_encoder(torch.from_numpy(ids)[None]).isfinite().all()
        h, _ = model.vae.encode(torch.rand(1, 3, 1, *NANO.image_hw) * 2 - 1)
        z = model.vae.raw_features(h)
        features, _ = model.vae.decode_features(z)
        assert features.isfinite().all()
        assert features.std() > 1e-4
        assert model.latent_head.tokens(features).isfinite().all()


def test_the_same_seed_gives_the_same_shards_and_another_does_not(nano, tmp_path):
    make_checkpoint(NANO, tmp_path / "again", seed=7, shard_bytes=1_500_000)
    make_checkpoint(NANO, tmp_path / "other", seed=8, shard_bytes=1_500_000)

    def digests(folder: Path) -> list[str]:
        files = [*sorted((folder / "backbone/gpt").glob("*.safetensors")), folder / "text_encoder/tokenizer.json"]
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    assert digests(tmp_path / "again") == digests(nano)
    assert not set(digests(tmp_path / "other")[:-1]) & set(digests(nano)[:-1])
    assert torch.equal(
        open_any(tmp_path / "again").tensor("vae.proj_up.bias"), open_any(nano).tensor("vae.proj_up.bias")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_weights_have_the_planned_spread(dtype):
    planned = plan_tensor("block.weight", (300, 2500), dtype)
    assert planned.std == pytest.approx(0.02)
    weights = draw(0, "a", planned).double()
    assert 0.7 < weights.std() / planned.std < 1.42
    assert abs(weights.mean()) < 1e-4
    assert weights.abs().max() < 4.6 * planned.std
    assert weights.abs().min() > 0
    assert not torch.equal(weights, draw(0, "b", planned).double())
    assert not torch.equal(weights, draw(1, "a", planned).double())
    assert torch.linalg.matrix_rank(weights[:, :400]) == 300


def test_a_large_tensor_comes_in_pieces():
    planned = plan_tensor("w.weight", (5, 4_000_003), torch.bfloat16)
    sizes = [len(piece) for piece in pieces(0, "w", planned)]
    assert sum(sizes) == planned.size_bytes
    assert max(sizes) <= 32 << 20
    assert len(sizes) == 2


def test_any_configuration_can_be_made(tmp_path):
    make_checkpoint(tiny_config(), tmp_path / "tiny", seed=0)
    assert open_any(tmp_path / "tiny").config == tiny_config()


def test_the_command_prints_what_it_made(tmp_path):
    out = tmp_path / "made"
    result = CliRunner().invoke(
        main,
        ["make-checkpoint", "--preset", "nano", "--random", "1", "--out", str(out), "--shard-gb", "0.001", "--json"],
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    files = [file for file in out.rglob("*") if file.is_file() and file.name != "released.json"]
    assert printed["bytes"] == sum(file.stat().st_size for file in files)
    assert printed["part_bytes"].keys() == {"backbone", "vae.pth", "text_encoder", "action_decoder.pt"}
    assert printed["parameters"] > 1e6


def test_a_folder_of_somebody_else_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUseError, match="holds other files"):
        make_checkpoint(NANO, tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_stopped_run_leaves_nothing(tmp_path):
    def stop(part: str, done: int, total: int) -> None:
        if part == "vae":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(NANO, tmp_path / "out", seed=0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free > 2_000e9:
        pytest.skip("more than 2 TB free")
    config = preset("worldvln-8b")
    big = replace(config, world_model=replace(config.world_model, intermediate=5_000_000))
    with pytest.raises(MakeCheckpointError, match=r"GB are needed and .* GB are free"):
        make_checkpoint(big, tmp_path / "out", seed=0)
    assert not list(tmp_path.iterdir())


def test_shards_of_no_size_are_refused(tmp_path):
    with pytest.raises(MakeCheckpointError, match="at least 1 byte"):
        make_checkpoint(NANO, tmp_path / "out", seed=0, shard_bytes=0)
