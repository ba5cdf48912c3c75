"""A checkpoint opened lazily gives the weights of the eager loaders, from every container, or says what is wrong."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import STATS, random_model, tiny_config, tokenizer_json

from worldvln_edge.config import ConfigError
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.checkpoint_source import (
    EXAMPLE_PARTS,
    IDENTITY_STATS,
    CheckpointChangedError,
    ReleasedParts,
    TensorInfo,
    load_source,
    open_any,
    open_checkpoint,
    open_parts,
    open_released,
)
from worldvln_edge.models.worldvln import WorldVLN, load_checkpoint

CONFIG = tiny_config()
LATENT = {name: np.array(getattr(STATS.latent_head, name), np.float32) for name in STATS.latent_head.__struct_fields__}


@pytest.fixture(scope="module")
def model() -> WorldVLN:
    return random_model(CONFIG, seed=5)


@pytest.fixture
def released(model: WorldVLN, tmp_path: Path) -> Path:
    """The model in released containers, with a `released.json`; may be broken."""
    folder = tmp_path / "released"
    write_shards(folder / "backbone" / "gpt", model.world_model.state_dict())
    text = dict(model.text_encoder.t5.state_dict())
    del text["encoder.embed_tokens.weight"]
    text |= {"decoder.final_layer_norm.weight": torch.ones(24), "lm_head.weight": torch.ones(32, 24)}
    write_shards(folder / "text_encoder", text)
    (folder / "text_encoder" / "tokenizer.json").write_text(tokenizer_json(CONFIG), encoding="utf-8")
    (folder / "text_encoder" / "config.json").write_text(model.text_encoder.t5.config.to_json_string(use_diff=False))
    torch.save({"vae": model.vae.state_dict()}, folder / "vae.pth")
    torch.save(combined(model), folder / "action.pt")
    description = {
        "backbone": "backbone",
        "vae": "vae.pth",
        "text_encoder": "text_encoder",
        "action_decoder": "action.pt",
        "config": json.loads(CONFIG.to_json()),
    }
    (folder / "released.json").write_text(json.dumps(description))
    return folder


def combined(model: WorldVLN, **entries) -> dict:
    return {
        "model_state_dict": model.latent_head.tsformer.state_dict(),
        "adapter_state_dict": {f"module.{k}": v for k, v in model.latent_head.adapter.state_dict().items()},
        "label_stats": LATENT,
        **entries,
    }


def write_shards(
    folder: Path,
    state: dict[str, torch.Tensor],
    names: tuple[str, str] = ("model-1.safetensors", "model-2.safetensors"),
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(state)
    parts = dict(zip(names, (keys[::2], keys[1::2]), strict=True))
    for name, part in parts.items():
        save_file({key: state[key].contiguous().clone() for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_description(folder: Path, **changes) -> None:
    path = folder / "released.json"
    content = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_own_folder_gives_what_the_eager_loader_gives(tiny_checkpoint):
    source = open_any(tiny_checkpoint)
    eager = load_checkpoint(tiny_checkpoint)
    expected = eager.model.state_dict()
    assert list(source.infos) == list(WorldVLN(CONFIG).state_dict())
    for key, tensor in expected.items():
        assert source.infos[key] == TensorInfo(shape=tuple(tensor.shape), dtype=torch.float16)
        assert source.tensor(key).dtype == torch.float16
        assert torch.equal(source.tensor(key).float(), tensor)
    assert (source.config, source.stats, source.missing_parts) == (CONFIG, STATS, frozenset())
    loaded = load_source(source)
    assert same(loaded.model.state_dict(), expected)
    assert (loaded.stats, loaded.tokenizer_file, loaded.tensor_file, loaded.missing_parts) == (
        eager.stats,
        eager.tokenizer_file,
        eager.tensor_file,
        frozenset(),
    )


def test_released_files_give_every_weight_and_say_that_the_rgb_head_is_missing(released, model):
    source = open_any(released)
    assert source.missing_parts == {"rgb_head"}
    expected = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("rgb_head.")}
    assert list(source.infos) == list(expected)
    loaded = load_source(source)
    assert same(loaded.model.state_dict(), expected)
    assert not hasattr(loaded.model, "rgb_head")
    assert loaded.missing_parts == {"rgb_head"}
    assert source.stats is not None
    np.testing.assert_allclose(source.stats.latent_head.mean, STATS.latent_head.mean, rtol=1e-6)
    assert source.stats.rgb_head == IDENTITY_STATS
    assert source.tokenizer_file == released / "text_encoder" / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"no tensor rgb_head\.tsformer\.norm\.bias: part rgb_head is missing"):
        source.tensor("rgb_head.tsformer.norm.bias")
    with pytest.raises(CheckpointError, match="no such key"):
        source.tensor("vae.nothing")


def test_the_rgb_head_comes_from_its_own_files(released, model):
    torch.save({"model_state_dict": model.rgb_head.tsformer.state_dict()}, released / "rgb.pth")
    stats = {name: list(getattr(STATS.rgb_head, name)) for name in STATS.rgb_head.__struct_fields__}
    (released / "run_config.json").write_text(json.dumps({"label_stats": stats}))
    change_description(released, rgb_head="rgb.pth", rgb_run_config="run_config.json")
    source = open_any(released)
    assert not source.missing_parts
    assert same(load_source(source).model.state_dict(), model.state_dict())
    assert source.stats.rgb_head == STATS.rgb_head
    change_description(released, rgb_run_config=None)
    with pytest.raises(CheckpointError, match=r"needs its run_config\.json"):
        open_any(released)


def test_the_stage_2_decoder_replaces_the_decoder_side_only(released, model):
    part = {
        key: tensor + 0.25
        for key, tensor in model.vae.state_dict().items()
        if key.startswith(("decoder.", "proj_up.")) and tensor.is_floating_point()
    }
    torch.save(combined(model, vae_state_dict=part), released / "action.pt")
    source = open_any(released)
    for key, tensor in model.vae.state_dict().items():
        assert torch.equal(source.tensor(f"vae.{key}"), part.get(key, tensor)), key


def test_without_label_statistics_there_are_none(released, model):
    torch.save(combined(model, label_stats=None), released / "action.pt")
    with pytest.warns(UserWarning, match="no label_stats"):
        source = open_any(released)
    assert source.stats is None
    assert load_source(source).stats.latent_head == IDENTITY_STATS


def test_a_repository_folder_brings_its_own_vae(released, model):
    write_shards(released / "backbone" / "vae", model.vae.state_dict())
    change_description(released, vae=None)
    (released / "vae.pth").unlink()
    assert torch.equal(open_any(released).tensor("vae.proj_up.bias"), model.vae.proj_up.bias)


def test_a_repositorys_vae_is_laid_over_the_base(released, model):
    own = {"proj_up.bias": torch.full_like(model.vae.proj_up.bias, 7.0), "proj_up.weight": model.vae.proj_up.weight}
    write_shards(released / "backbone" / "vae", own)
    source = open_any(released)
    assert torch.equal(source.tensor("vae.proj_up.bias"), own["proj_up.bias"])
    assert torch.equal(source.tensor("vae.proj_down.bias"), model.vae.proj_down.bias)


def test_unused_projections_may_be_absent_from_the_vae(released, model):
    state = {key: tensor for key, tensor in model.vae.state_dict().items() if "_two" not in key}
    torch.save({"vae": state}, released / "vae.pth")
    assert not open_any(released).tensor("vae.proj_up_two.weight").any()


def test_the_token_table_may_stand_under_its_other_name(released, model):
    text = dict(model.text_encoder.t5.state_dict())
    del text["shared.weight"]
    write_shards(released / "text_encoder", text)
    source = open_any(released)
    assert torch.equal(source.tensor("text_encoder.t5.shared.weight"), model.text_encoder.t5.shared.weight)


def test_fingerprint_depends_on_contents_and_not_on_the_order_of_shards(released, model):
    calls = []
    before = open_any(released).fingerprint(lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == sum({p: p.stat().st_size for _, p in open_any(released).files}.values())
    state, gpt = dict(model.world_model.state_dict()), released / "backbone" / "gpt"
    write_shards(gpt, state, names=("model-2.safetensors", "model-1.safetensors"))
    assert open_any(released).fingerprint() == before
    state["head.bias"] = state["head.bias"] + 1
    write_shards(gpt, state)
    source = open_any(released)
    assert source.fingerprint() != before
    (released / "vae.pth").unlink()
    with pytest.raises(CheckpointError, match=r"vae\.pth was there"):
        source.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vae.pth"}, r"vae is a video VAE"),
        ({"backbone": "text_encoder"}, "holds a T5 text encoder, but a world model is expected here"),
        ({"backbone": "nothing"}, "no weights at"),
        ({"vae": "action.pt"}, r"action\.pt: no entry 'vae'"),
        ({"vae": "backbone/gpt"}, "VAE tensors are missing .* this file holds a world model"),
        ({"vae": "nothing.pth"}, "no video VAE at"),
        ({"vae": None}, r"no video VAE: .*backbone has no folder vae/"),
        ({"text_encoder": "backbone/gpt"}, "holds a world model, but a T5 text encoder is expected here"),
        ({"text_encoder": "nothing"}, "no text encoder at"),
        ({"action_decoder": "vae.pth"}, "no TimesFormer: expected one of .* found vae; give a combined"),
        ({"tokenizer": "nothing.json"}, "no tokenizer: .*nothing.json is no file"),
        ({"config": None}, "give either preset"),
        ({"preset": "nano"}, "give either preset"),
        ({"surprise": 1}, "not a list of released parts"),
    ],
)
def test_parts_in_the_wrong_place_are_named(released, change, message):
    change_description(released, **change)
    with pytest.raises(CheckpointError, match=message):
        open_any(released)


def test_another_preset_does_not_fit(released):
    change_description(released, config=None, preset="nano")
    with pytest.raises(CheckpointError, match=r"describes another T5: d_model 24 \(expected 128\)"):
        open_any(released)
    (released / "text_encoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"keys missing .*choose the preset"):
        open_any(released)
    change_description(released, preset="huge")
    with pytest.raises(ConfigError, match="unknown preset 'huge'"):
        open_any(released)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('{"model_type": "bert"}', "describes a bert"), ('{"feed_forward_proj": "relu"}', "proj relu")],
)
def test_a_text_encoder_of_another_kind_is_refused(released, content, message):
    (released / "text_encoder" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_any(released)


def test_missing_shards_and_truncated_files_are_named(released):
    shard = released / "backbone" / "gpt" / "model-2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: truncated"):
        open_any(released)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"names shards that are not here: model-2\.safetensors"):
        open_any(released)
    shard.write_bytes(whole)
    vae = released / "vae.pth"
    vae.write_bytes(vae.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match=r"vae\.pth"):
        open_any(released)


def test_weights_that_are_not_finite_are_found_when_they_are_read(released, model):
    state = {key: tensor.clone() for key, tensor in model.vae.state_dict().items()}
    state["proj_down.weight"][1, 2] = float("nan")
    torch.save({"vae": state}, released / "vae.pth")
    source = open_any(released)
    assert source.tensor("vae.proj_down.bias").isfinite().all()
    with pytest.raises(CheckpointError, match=r"vae\.pth: vae\.proj_down\.weight holds NaN or infinity"):
        source.tensor("vae.proj_down.weight")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_source(source)


class OwnArguments:
    """Something that only an unrestricted pickle brings back."""


def test_foreign_objects_are_read_only_when_trusted(released, model):
    torch.save(combined(model, args=OwnArguments()), released / "action.pt")
    with pytest.raises(CheckpointError, match=r"action\.pt holds objects other than .*--trust-pickle"):
        open_any(released)
    assert open_any(released, trust_pickle=True).missing_parts == {"rgb_head"}


def test_what_is_no_checkpoint_is_said_so(tmp_path, tiny_checkpoint):
    with pytest.raises(CheckpointError, match=r"expected config\.json and model\.safetensors, or released\.json"):
        open_any(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_any(tmp_path / "nothing")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        open_any(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        open_checkpoint(folder)


def test_a_file_that_changes_after_opening_is_named(released, model):
    source = open_any(released)
    source.check_unchanged()
    torch.save({"vae": model.vae.state_dict(), "note": "longer"}, released / "vae.pth")
    with pytest.raises(CheckpointChangedError, match=r"vae\.pth was changed .* since it was opened"):
        source.check_unchanged()
    source = open_any(released)
    (released / "text_encoder" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointChangedError, match=r"tokenizer\.json is gone since it was opened"):
        source.check_unchanged()


def test_the_example_in_messages_is_a_complete_description(tmp_path):
    with pytest.raises(CheckpointError, match="by --backbone, --vae, --text, --action and --preset, or in released"):
        open_any(tmp_path)
    parts = msgspec.json.decode(EXAMPLE_PARTS, type=ReleasedParts)
    with pytest.raises(CheckpointError, match=r"no text encoder at .*flan-t5-xl"):
        open_parts(parts, tmp_path)


def test_parts_may_be_named_one_by_one(released, model):
    source = open_released(
        backbone=released / "backbone" / "gpt",
        vae=released / "vae.pth",
        text_encoder=released / "text_encoder",
        action_decoder=released / "action.pt",
        tokenizer=None,
        preset=CONFIG,
    )
    assert torch.equal(source.tensor("world_model.head.bias"), model.world_model.head.bias)
    assert source.fingerprint() == open_any(released).fingerprint()
