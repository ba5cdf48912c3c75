"""Adapter and combined checkpoints: written in the released layout, and read from every form of it."""

import pickle
from pathlib import Path

import pytest
import torch
from small_models import STATS, random_model, tiny_config

from worldvln_edge.models.action_decoder import LatentActionHead
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.released_action import (
    COMBINED_FILE,
    load_latent_head,
    load_timesformer,
    open_timesformer,
    read_combined_checkpoint,
    save_combined_checkpoint,
)
from worldvln_edge.models.released_adapter import (
    EXPORT_FILE,
    load_adapter,
    read_adapter_checkpoint,
    save_adapter_export,
)
from worldvln_edge.models.released_vae import open_vae_tensors, vae_for_actions
from worldvln_edge.models.stored_tensors import read_all
from worldvln_edge.models.video_vae import VideoVAE

CONFIG = tiny_config()
MODEL = random_model(CONFIG)
STATE = MODEL.latent_head.adapter.state_dict()


def new_head() -> LatentActionHead:
    torch.manual_seed(1)
    return LatentActionHead(CONFIG.action_decoder, CONFIG.video_vae.feature_channels)


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def saved(content, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (
            {
                "epoch": 4,
                "global_step": 99,
                "adapter_state_dict": STATE,
                "optimizer_state_dict": {"state": {}, "param_groups": []},
                "scaler_state_dict": {},
                "args": {"lr": 5e-5},
                "adapter": STATE,
                "step": 99,
            },
            (4, 99),
        ),
        ({"adapter": STATE, "step": 7}, (None, 7)),
        ({"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}}, (None, None)),
        (STATE, (None, None)),
    ],
)
def test_an_adapter_is_read_from_every_form(content: dict, steps: tuple, tmp_path: Path):
    checkpoint = read_adapter_checkpoint(saved(content, tmp_path / "stage1_adapter_last.pt"))
    adapter = new_head().adapter
    load_adapter(adapter, checkpoint)
    assert same(adapter.state_dict(), STATE)
    assert (checkpoint.epoch, checkpoint.global_step) == steps
    assert checkpoint.vae == {}


def test_the_exported_adapter_brings_its_vae_along(tmp_path: Path):
    path = tmp_path / "out" / EXPORT_FILE
    save_adapter_export(path, MODEL.latent_head.adapter, MODEL.vae, {"lr": 5e-5})
    checkpoint = read_adapter_checkpoint(path)
    assert same(read_all(checkpoint.adapter), STATE)
    assert same(read_all(checkpoint.vae), MODEL.vae.state_dict())
    assert same(read_all(open_vae_tensors(path)), MODEL.vae.state_dict())
    content = torch.load(path, weights_only=True)
    assert set(content) == {"vae_state_dict", "adapter_state_dict", "exported_at", "args"}


@pytest.mark.parametrize("content", [{"vae_state_dict": {}}, {"cls_token": torch.zeros(1, 1, 4)}, {}])
def test_a_file_without_an_adapter_is_refused(content: dict, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no adapter: expected one of adapter_state_dict"):
        read_adapter_checkpoint(saved(content, tmp_path / "other.pt"))


def test_what_is_no_dict_or_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="expected a dict, found Tensor"):
        read_adapter_checkpoint(saved(torch.zeros(3), tmp_path / "tensor.pt"))
    with pytest.raises(CheckpointError, match="no such file"):
        read_adapter_checkpoint(tmp_path / "missing.pt")
    checkpoint = read_adapter_checkpoint(saved(STATE, tmp_path / "adapter.pt"))
    with pytest.raises(CheckpointError, match=r"adapter.pt: adapter"):
        load_adapter(Adapter(CONFIG.action_decoder.adapter, 8, 12), checkpoint)


def test_a_combined_checkpoint_gives_back_head_decoder_and_statistics(tmp_path: Path):
    path = tmp_path / COMBINED_FILE
    save_combined_checkpoint(
        path,
        MODEL.latent_head,
        MODEL.vae,
        STATS.latent_head,
        stats_source="training flights",
        epoch=3,
        global_step=120,
        settings={"semantic_scales": 2},
    )
    checkpoint = read_combined_checkpoint(path)
    head = new_head()
    load_latent_head(head, checkpoint)
    assert same(head.state_dict(), MODEL.latent_head.state_dict())
    for name in ("mean", "std"):
        assert getattr(checkpoint.label_stats, name).tolist() == getattr(STATS.latent_head, name).tolist()
    assert checkpoint.label_stats_source == "training flights"
    assert checkpoint.vae_settings["semantic_scales"] == 2
    assert checkpoint.vae_settings["infinitystar_vae_type"] == 16
    torch.manual_seed(2)
    other = VideoVAE(CONFIG.video_vae)
    decoder = vae_for_actions(other, read_all(checkpoint.vae), str(path))
    codes = torch.randn(1, 16, 3, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(decoder.decode_features(codes)[0], MODEL.vae.decode_features(codes)[0])


def test_a_combined_checkpoint_has_the_released_layout_and_nothing_of_this_machine(tmp_path: Path):
    path = tmp_path / COMBINED_FILE
    save_combined_checkpoint(
        path, MODEL.latent_head, MODEL.vae, STATS.latent_head, stats_source="given", epoch=1, global_step=1
    )
    content = torch.load(path, weights_only=True)
    assert content["format"] == "stage2_latent2action_combined_v2_resumable"
    assert content["model_config"] == {"num_frames": 3, "embed_dim": 24, "patch_size": 4, "W_grid": 4}
    assert same(content["model_state_dict"], content["tsformer_state_dict"])
    starts = ("proj_up.", "decoder.", "scale_learnable_parameters")
    assert all(name.startswith(starts) for name in content["vae_state_dict"])
    assert not any(name.startswith("optimizer") for name in content)
    plain = {name: value for name, value in content.items() if "state_dict" not in name}
    assert str(tmp_path) not in repr(plain)


@pytest.mark.parametrize(
    ("name", "format_", "without"),
    [
        (COMBINED_FILE, "stage2_latent2action_combined_v2_resumable", ()),
        ("checkpoint_last.pth", "stage2_latent2action_checkpoint_combined_v1", ("tsformer_state_dict",)),
        ("checkpoint_pre_fulltrain_e20.pth", "stage2_latent2action_checkpoint_pre_fulltrain_v1", ("vae_state_dict",)),
    ],
)
def test_all_three_released_files_are_read(name: str, format_: str, without: tuple, tmp_path: Path):
    save_combined_checkpoint(
        tmp_path / "own.pt", MODEL.latent_head, MODEL.vae, STATS.latent_head, stats_source="", epoch=1, global_step=1
    )
    content = torch.load(tmp_path / "own.pt", weights_only=True) | {"format": format_}
    content |= {"optimizer_state_dict": {"state": {}}, "scaler_state_dict": {}}
    for key in without:
        del content[key]
    checkpoint = read_combined_checkpoint(saved(content, tmp_path / name))
    head = new_head()
    load_latent_head(head, checkpoint)
    assert same(head.state_dict(), MODEL.latent_head.state_dict())
    assert checkpoint.format == format_


def test_a_failed_write_leaves_the_older_file(tmp_path: Path):
    path = tmp_path / EXPORT_FILE
    save_adapter_export(path, MODEL.latent_head.adapter, MODEL.vae, {})
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_adapter_export(path, MODEL.latent_head.adapter, MODEL.vae, {"function": lambda: None})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [EXPORT_FILE]


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_pretrained_timesformer_starts_the_latent_head(is_wrapped: bool, tmp_path: Path):
    state = MODEL.latent_head.tsformer.state_dict()
    path = saved({"model_state_dict": state} if is_wrapped else state, tmp_path / "tsformer.pth")
    head = new_head()
    load_timesformer(head.tsformer, open_timesformer(path), str(path))
    assert same(head.tsformer.state_dict(), state)
    with pytest.raises(CheckpointError, match="TimesFormer"):
        load_timesformer(head.tsformer, open_timesformer(saved(STATE, tmp_path / "adapter.pt")), "adapter.pt")
