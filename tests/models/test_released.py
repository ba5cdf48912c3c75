"""Loading released weights: every container, every tolerance, every error a user can meet."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from worldvln_edge.config import WorldModelConfig
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.released import load_world_model, open_world_model
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.models.world_model import WorldModel, initial_cfg_uncond
from worldvln_edge.presets import preset

CONFIG = WorldModelConfig(
    width=32, depth=2, heads=4, kv_heads=2, intermediate=48, block_chunks=2, text_channels=8, text_max_tokens=6
)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return {key: torch.randn_like(tensor) for key, tensor in WorldModel(CONFIG).state_dict().items()}


def _assert_loaded(path: Path, state: dict[str, torch.Tensor], **options) -> None:
    loaded = load_world_model(path, CONFIG, block_dtype=torch.float32, **options).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def _save_shards(folder: Path, state: dict[str, torch.Tensor], index: bool, metadata: dict | None = None) -> None:
    folder.mkdir(parents=True)
    keys = sorted(state)
    names = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, part in names.items():
        save_file({key: state[key] for key in part}, folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {key: name for name, part in names.items() for key in part}
        content = {"metadata": {"total_size": 1} | (metadata or {}), "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("index", [True, False])
def test_shard_folder_loads(tmp_path, state, index):
    _save_shards(tmp_path / "shards", state, index)
    _assert_loaded(tmp_path / "shards", state)


def test_repository_folder_loads_its_transformer_part(tmp_path, state):
    _save_shards(tmp_path / "gpt", state, index=True)
    (tmp_path / "vae").mkdir()
    save_file({"decoder.weight": torch.zeros(1)}, tmp_path / "vae" / "model.safetensors")
    _assert_loaded(tmp_path, state)


def test_single_safetensors_file_loads(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    _assert_loaded(tmp_path / "model.safetensors", state)


@pytest.mark.parametrize("legacy", [True, False])
def test_slim_torch_file_loads(tmp_path, state, legacy):
    torch.save(state, tmp_path / "slim.pth", _use_new_zipfile_serialization=not legacy)
    _assert_loaded(tmp_path / "slim.pth", state)


def test_training_checkpoint_loads(tmp_path, state):
    torch.save({"epoch": 3, "args": {"lr": 1e-5}, "trainer": {"gpt_fsdp": state}}, tmp_path / "global_step_9.pth")
    _assert_loaded(tmp_path / "global_step_9.pth", state)


def test_indexed_torch_shards_load(tmp_path, state):
    keys = list(state)
    torch.save({key: state[key] for key in keys[:9]}, tmp_path / "a.bin")
    torch.save({key: state[key] for key in keys[9:]}, tmp_path / "b.bin")
    weight_map = {key: "a.bin" if key in keys[:9] else "b.bin" for key in keys}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _assert_loaded(tmp_path, state)


def test_blocks_are_cast_and_the_rest_is_fp32(tmp_path, state):
    save_file({key: tensor.half() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    model = load_world_model(tmp_path / "model.safetensors", CONFIG)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if key.startswith("block_chunks.") else torch.float32), key
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_alias_keys_get_their_canonical_tensor(tmp_path, state):
    alias, canonical = (f"block_chunks.{i}.module.0.input_layernorm.weight" for i in (1, 0))
    kept = {key: tensor for key, tensor in state.items() if key != alias}
    _save_shards(tmp_path / "aliased", kept, index=True, metadata={alias: canonical})
    _assert_loaded(tmp_path / "aliased", state | {alias: state[canonical]})


def test_alias_of_an_absent_key_does_not_hide_what_is_missing(tmp_path, state):
    kept = {key: tensor for key, tensor in state.items() if key != "head.bias"}
    _save_shards(tmp_path / "shards", kept, index=True, metadata={"head.bias": "gone"})
    with pytest.raises(CheckpointError, match=r"1 keys missing \(first \['head\.bias'\]\).*of shape \[128\]"):
        load_world_model(tmp_path / "shards", CONFIG)


def test_shorter_cfg_uncond_is_filled_with_own_rows(tmp_path, state):
    save_file(state | {"cfg_uncond": state["cfg_uncond"][:4].clone()}, tmp_path / "model.safetensors")
    loaded = load_world_model(tmp_path / "model.safetensors", CONFIG).cfg_uncond
    assert torch.equal(loaded[:4], state["cfg_uncond"][:4])
    assert torch.equal(loaded[4:], initial_cfg_uncond(CONFIG)[4:])


def test_longer_cfg_uncond_is_cut(tmp_path, state):
    longer = torch.cat([state["cfg_uncond"], torch.ones(3, 8)])
    save_file(state | {"cfg_uncond": longer}, tmp_path / "model.safetensors")
    _assert_loaded(tmp_path / "model.safetensors", state)


def test_known_leftover_keys_are_ignored_and_sos_token_may_be_missing(tmp_path, state):
    del state["sos_token"]
    save_file(state | {"lvl_1L": torch.zeros(3), "attn_bias_for_masking": torch.zeros(2)}, tmp_path / "m.safetensors")
    _assert_loaded(tmp_path / "m.safetensors", state | {"sos_token": torch.zeros(1, 1, 32)})


def test_missing_and_unexpected_keys_are_listed(tmp_path, state):
    del state["head.weight"]
    save_file(state | {"lora.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 keys missing \(first \['head\.weight'\]\), 1 unexpected \(first \['lora"
    ):
        load_world_model(tmp_path / "m.safetensors", CONFIG)


def test_long_lists_of_wrong_keys_are_cut(tmp_path, state):
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "m.safetensors")
    message = r"32 keys missing \(first \['[^]]*'\]\), 33 unexpected \(first \['module\.[^]]*'\]\).*choose the preset"
    with pytest.raises(CheckpointError, match=message):
        load_world_model(tmp_path / "m.safetensors", CONFIG)


def test_weights_of_another_size_are_refused(tmp_path, state):
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has shape \[32, 48\], .* says \[32, 64\]"):
        load_world_model(tmp_path / "m.safetensors", msgspec.structs.replace(CONFIG, intermediate=64))


def test_nothing_at_the_path_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no weights at"):
        load_world_model(tmp_path / "absent", CONFIG)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_world_model(tmp_path, CONFIG)


def test_missing_shard_is_named(tmp_path, state):
    _save_shards(tmp_path / "shards", state, index=True)
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names shards that are not here: model-00002"):
        load_world_model(tmp_path / "shards", CONFIG)


def test_shard_that_lacks_promised_keys_is_named(tmp_path, state):
    _save_shards(tmp_path / "shards", state, index=True)
    save_file({"x": torch.zeros(1)}, tmp_path / "shards" / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="lacks keys its index promises"):
        load_world_model(tmp_path / "shards", CONFIG)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_unusable_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_world_model(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
@pytest.mark.parametrize("kept", [0, 7, 3000])
def test_truncated_files_are_refused(tmp_path, state, name, kept):
    whole = tmp_path / name
    if name.endswith("pth"):
        torch.save(state, whole)
    else:
        save_file(state, whole)
    whole.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        load_world_model(whole, CONFIG)


def test_pickled_objects_are_read_only_when_trusted(tmp_path, state):
    torch.save({"args": Path("x"), "trainer": {"gpt_fsdp": state}}, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        load_world_model(tmp_path / "old.pth", CONFIG)
    _assert_loaded(tmp_path / "old.pth", state, trust_pickle=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainer": {"gpt_opt": {}}}, "no state dict gpt_fsdp"),
        ({"epoch": 3}, "must be a state dict .* keys epoch"),
        ({"vae": {"encoder.down_blocks.0.x": torch.zeros(1)}}, "vae is a video VAE"),
        ([1, 2], "found a list"),
    ],
)
def test_torch_files_with_other_content_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_world_model(tmp_path / "x.pth", CONFIG)


def test_a_video_vae_in_place_of_the_transformer_is_called_so(tmp_path):
    state = VideoVAE(preset("nano").video_vae).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds a video VAE, but a world model is expected here"):
        load_world_model(tmp_path / "m.safetensors", CONFIG)


def test_two_files_with_the_same_key_and_no_index_are_refused(tmp_path, state):
    for name in ("a", "b"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors and a\.safetensors .* both hold"):
        load_world_model(tmp_path, CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_weights_that_are_not_finite_name_file_and_key(tmp_path, state, name, value):
    key = "block_chunks.1.module.0.mlp.up_proj.weight"
    state[key][3, 4] = value
    (torch.save if name.endswith("pth") else save_file)(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: {key} holds NaN or infinity"):
        load_world_model(tmp_path / name, CONFIG)


def test_opening_reads_no_tensor(tmp_path, state):
    state["head.bias"][0] = float("nan")
    save_file(state, tmp_path / "m.safetensors")
    stored = open_world_model(tmp_path / "m.safetensors", CONFIG)
    assert list(stored) == list(WorldModel(CONFIG).state_dict())
    assert torch.equal(stored["head.weight"].read(), state["head.weight"])
    with pytest.raises(CheckpointError, match=r"head\.bias holds NaN"):
        stored["head.bias"].read()
