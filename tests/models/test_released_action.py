"""Loaders of released VAE and action-decoder files: every container, every refusal."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.checkpoint_file import CheckpointError, read_torch_file
from worldvln_edge.models.released_action import (
    load_latent_head,
    load_rgb_head,
    open_rgb_checkpoint,
    parse_label_stats,
    read_combined_checkpoint,
)
from worldvln_edge.models.released_vae import (
    complete_vae,
    load_vae,
    open_vae_tensors,
    read_vae_tensors,
    vae_for_actions,
    with_action_decoder,
)
from worldvln_edge.models.stored_tensors import open_safetensors, open_shards
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.presets import preset

MODEL = preset("nano")
STATS = {
    "mean_angles": np.array([0.1, 0.2, 0.3], np.float32),
    "std_angles": np.array([1, 2, 3], np.float32),
    "mean_t": np.array([4, 5, 6], np.float32),
    "std_t": np.array([7, 8, 9], np.float32),
}


class CustomObject:
    """Something that a safe load must refuse."""


@pytest.fixture(scope="module")
def head() -> LatentActionHead:
    torch.manual_seed(0)
    return LatentActionHead(MODEL.action_decoder, MODEL.video_vae.feature_channels)


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(MODEL.video_vae).requires_grad_(False)


@pytest.fixture
def combined(head) -> dict:
    return {
        "format": "stage2_latent2action_combined_v2_resumable",
        "epoch": 3,
        "best_val": np.float64(0.5),
        "model_state_dict": {f"module.{key}": tensor for key, tensor in head.tsformer.state_dict().items()},
        "adapter_state_dict": head.adapter.state_dict(),
        "label_stats": STATS,
        "label_stats_source": "run_config.json",
        "args": {"semantic_scales": 7, "infinitystar_vae_type": 3},
        "infinitystar_vae_type": 64,
    }


def saved(content, folder, name="checkpoint.pth"):
    torch.save(content, folder / name)
    return folder / name


def same_tensors(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_combined_checkpoint_loads_with_numpy_statistics_and_without_trust(combined, head, tmp_path):
    checkpoint = read_combined_checkpoint(saved(combined, tmp_path))
    assert checkpoint.label_stats.std_t == (7.0, 8.0, 9.0)
    assert checkpoint.label_stats_source == "run_config.json"
    assert checkpoint.format.endswith("v2_resumable")
    assert checkpoint.vae_settings["semantic_scales"] == 7
    assert checkpoint.vae_settings["infinitystar_vae_type"] == 64
    assert checkpoint.vae_settings["detail_scale_dim"] == 64
    other = LatentActionHead(MODEL.action_decoder, MODEL.video_vae.feature_channels)
    load_latent_head(other, checkpoint)
    assert same_tensors(other.state_dict(), head.state_dict())


def test_the_first_of_two_names_of_an_entry_wins(combined, tmp_path):
    combined["tsformer_state_dict"] = combined["state_dict"] = {"wrong": torch.zeros(1)}
    checkpoint = read_combined_checkpoint(saved(combined, tmp_path))
    assert "cls_token" in checkpoint.tsformer
    assert "patch.weight" in checkpoint.adapter
    combined["tsformer_state_dict"] = combined.pop("model_state_dict")
    combined["state_dict"] = combined.pop("adapter_state_dict")
    checkpoint = read_combined_checkpoint(saved(combined, tmp_path))
    assert "cls_token" in checkpoint.tsformer
    assert "patch.weight" in checkpoint.adapter


@pytest.mark.parametrize(
    ("key", "what"), [("model_state_dict", "no TimesFormer"), ("adapter_state_dict", "no adapter")]
)
def test_a_missing_part_is_named(combined, tmp_path, key, what):
    del combined[key]
    with pytest.raises(CheckpointError, match=what):
        read_combined_checkpoint(saved(combined, tmp_path))


def test_missing_statistics_give_a_warning(combined, tmp_path):
    combined["label_stats"] = None
    with pytest.warns(UserWarning, match="no label_stats"):
        assert read_combined_checkpoint(saved(combined, tmp_path)).label_stats is None


def test_keys_and_shapes_are_strict(combined, head, tmp_path):
    target = LatentActionHead(MODEL.action_decoder, MODEL.video_vae.feature_channels)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    combined["adapter_state_dict"] = {**head.adapter.state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load_latent_head(target, read_combined_checkpoint(saved(combined, tmp_path)))
    combined["adapter_state_dict"] = {**head.adapter.state_dict(), "patch.bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"patch\.bias has shape \[1\]"):
        load_latent_head(target, read_combined_checkpoint(saved(combined, tmp_path)))
    assert same_tensors(target.state_dict(), before)


def test_other_objects_are_refused_unless_trusted(combined, tmp_path):
    combined["args"] = CustomObject()
    path = saved(combined, tmp_path)
    with pytest.raises(CheckpointError, match="trust-pickle"):
        read_combined_checkpoint(path)
    combined["args"] = None
    assert read_combined_checkpoint(saved(combined, tmp_path), trust_pickle=True).vae_settings["semantic_scales"] == 11


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch_file(tmp_path / "absent.pth")
    whole = saved({"a": torch.zeros(100)}, tmp_path).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_bytes(b"no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps([1, 2]))
    for name in ("cut", "text", "empty"):
        with pytest.raises(CheckpointError, match=f"{name}.pth"):
            read_torch_file(tmp_path / f"{name}.pth")


def test_what_is_no_combined_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected a dict, found list"):
        read_combined_checkpoint(saved([], tmp_path))
    empty = saved({"label_stats": STATS}, tmp_path)
    with pytest.raises(CheckpointError, match=r"no TimesFormer: .* found label_stats"):
        read_combined_checkpoint(empty)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std_t": None}, "std_t is missing"),
        ({"std_t": [1, 2]}, "std_t must be 3 finite numbers"),
        ({"std_t": [1, 2, 0]}, "above 0"),
        ({"mean_t": [1, 2, float("nan")]}, "mean_t must be 3 finite"),
        ({"mean_t": ["a", "b", "c"]}, "mean_t must be 3 numbers"),
    ],
)
def test_statistics_that_cannot_work_are_refused(change, message):
    stats = {key: value for key, value in {**STATS, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        parse_label_stats(stats, "label_stats")


def test_the_rgb_head_loads_from_both_forms_and_needs_its_run_config(tmp_path):
    source, target = RgbActionHead(MODEL.action_decoder), RgbActionHead(MODEL.action_decoder)
    run_config = tmp_path / "run_config.json"
    run_config.write_text(json.dumps({"label_stats": {k: v.tolist() for k, v in STATS.items()}}))
    for content in (source.tsformer.state_dict(), {"model_state_dict": source.tsformer.state_dict()}):
        path = saved(content, tmp_path)
        tensors, stats = open_rgb_checkpoint(path, run_config)
        load_rgb_head(target, tensors, str(path))
        assert same_tensors(target.state_dict(), source.state_dict())
        assert stats.std_angles == (1.0, 2.0, 3.0)
    run_config.write_text("{}")
    with pytest.raises(CheckpointError, match="label_stats must hold"):
        open_rgb_checkpoint(path, run_config)
    run_config.unlink()
    with pytest.raises(CheckpointError, match="not a readable JSON"):
        open_rgb_checkpoint(path, run_config)


def write_shards(folder, tensors, aliases):
    """Two shards with an index; `aliases` go into the index's metadata."""
    folder.mkdir(parents=True)
    keys = sorted(set(tensors) - set(aliases))
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{number}.safetensors"
        save_file({key: tensors[key].contiguous().clone() for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1, **aliases}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_vae_loads_from_every_container(vae, tmp_path):
    state = vae.state_dict()
    write_shards(tmp_path / "repo" / "vae", state, {"proj_up_two.bias": "proj_down_two.bias"})
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "vae.safetensors")
    torch.save({"vae": state, "ema": {}}, tmp_path / "wrapped.pth")
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "bare.pth")
    torch.save({"trainer": {"vae_local": state}, "vae": {"decoy": torch.zeros(1)}}, tmp_path / "trainer.pth")
    torch.save({"vae_state_dict": {}, "vae": {}, "ema": state}, tmp_path / "ema.pth")
    target = VideoVAE(MODEL.video_vae).requires_grad_(False)
    for name in ("repo", "repo/vae", "vae.safetensors", "wrapped.pth", "bare.pth", "trainer.pth", "ema.pth"):
        for tensor in target.state_dict().values():
            tensor.zero_()
        tensors = read_vae_tensors(tmp_path / name)
        load_vae(target, tensors, name)
        needed = {k: v for k, v in state.items() if "_two" not in k}
        assert same_tensors({k: target.state_dict()[k] for k in needed}, needed)
    assert torch.equal(read_vae_tensors(tmp_path / "repo")["proj_up_two.bias"], state["proj_down_two.bias"])


def test_vae_loading_is_strict_about_what_is_used(vae):
    state = dict(vae.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unused = {key: tensor for key, tensor in state.items() if "_two" not in key}
        load_vae(VideoVAE(MODEL.video_vae), {**unused, "quantizer.lfq_detail.mask": torch.zeros(64)}, "file")
    with pytest.warns(UserWarning, match="1 unexpected tensors"):
        load_vae(VideoVAE(MODEL.video_vae), {**state, "surprise": torch.zeros(1)}, "file")
    with pytest.raises(CheckpointError, match=r"scale_learnable_parameters has shape \[3\]"):
        load_vae(VideoVAE(MODEL.video_vae), {**state, "scale_learnable_parameters": torch.zeros(3)}, "file")
    del state["encoder.norm_out.gamma"]
    with pytest.raises(CheckpointError, match=r"1 VAE tensors are missing .*encoder\.norm_out"):
        load_vae(VideoVAE(MODEL.video_vae), state, "file")


def test_damaged_shard_folders_are_refused(vae, tmp_path):
    folder = tmp_path / "vae"
    write_shards(folder, vae.state_dict(), {})
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weight_map, message in (
        ({**good["weight_map"], "decoder.extra": "model-0.safetensors"}, "promises: decoder.extra"),
        ({"a": "../model.safetensors"}, "lies outside the folder"),
        ({"a": "absent.safetensors"}, "not here: absent.safetensors"),
        ({}, "weight_map is empty"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_shards(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="no shard index"):
        open_shards(folder)
    index.unlink()
    assert open_shards(folder).keys() == vae.state_dict().keys()
    (folder / "model-0.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="truncated"):
        open_safetensors(folder / "model-0.safetensors")
    with pytest.raises(CheckpointError, match="no entry 'vae'"):
        read_vae_tensors(saved({"gpt": {}}, tmp_path))
    with pytest.raises(CheckpointError, match="must be a state dict"):
        read_vae_tensors(saved({"vae": 3}, tmp_path))


def test_the_decoder_of_a_combined_checkpoint_is_shared_when_equal(vae):
    part = {key: tensor.clone() for key, tensor in vae.state_dict().items() if key.startswith(("decoder.", "proj_up."))}
    assert vae_for_actions(vae, {}, "file") is vae
    assert vae_for_actions(vae, part, "file") is vae
    part["proj_up.bias"] += 1
    other = vae_for_actions(vae, part, "file")
    assert torch.equal(other.proj_up.bias, part["proj_up.bias"])
    assert not torch.equal(vae.proj_up.bias, part["proj_up.bias"])
    with pytest.raises(CheckpointError, match="not in the configuration"):
        vae_for_actions(vae, {"decoder.extra": torch.zeros(1)}, "file")
    with pytest.raises(CheckpointError, match="has shape"):
        vae_for_actions(vae, {"proj_up.bias": torch.zeros(1)}, "file")
    with pytest.warns(UserWarning, match="unexpected"):
        vae_for_actions(vae, {"post_quant_conv.bias": torch.zeros(1)}, "file")


def test_a_decoder_of_its_own_scale_is_folded_into_one_vae(vae, tmp_path):
    state = {key: tensor.clone() for key, tensor in vae.state_dict().items()}
    state["scale_learnable_parameters"][0] = 1.5
    part = {k: v.clone() for k, v in state.items() if k.startswith(("decoder.", "proj_up.", "scale_"))}
    generator = torch.Generator().manual_seed(1)
    part["proj_up.weight"] = torch.randn(part["proj_up.weight"].shape, generator=generator)
    part["scale_learnable_parameters"][0] = 0.4
    base = open_vae_tensors(saved({"vae": state}, tmp_path, "vae.pth"))
    own = open_vae_tensors(saved({"vae": part}, tmp_path, "part.pth"))
    merged = with_action_decoder(complete_vae(state, base, "vae"), own, "part")
    one, encoding = VideoVAE(MODEL.video_vae), VideoVAE(MODEL.video_vae)
    one.load_state_dict({key: stored.read() for key, stored in merged.items()})
    encoding.load_state_dict(state)
    acting = vae_for_actions(encoding, part, "part")
    assert acting is not encoding
    hw = [side // MODEL.video_vae.spatial_stride for side in MODEL.image_hw]
    with torch.no_grad():
        codes = torch.randn(1, MODEL.video_vae.raw_channels, 2, *hw, generator=generator)
        torch.testing.assert_close(
            one.decode_features(codes)[0], acting.decode_features(codes)[0], rtol=1e-4, atol=1e-4
        )
        h, _ = encoding.encode(torch.randn(1, 3, 1, *MODEL.image_hw, generator=generator))
        assert torch.equal(one.raw_features(h), encoding.raw_features(h))
    part["scale_learnable_parameters"][0] = 0
    own = open_vae_tensors(saved({"vae": part}, tmp_path, "zero.pth"))
    with pytest.raises(CheckpointError, match=r"scale_learnable_parameters\[0\] is 0"):
        with_action_decoder(complete_vae(state, base, "vae"), own, "part")["proj_up.weight"].read()
