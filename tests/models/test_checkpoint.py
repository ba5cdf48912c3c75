"""A checkpoint folder comes back as it was saved, or is refused with the reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import STATS, random_model, save_random_checkpoint, tiny_config, tokenizer_json

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ConfigError
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.worldvln import HeadStats, load_checkpoint, save_checkpoint

CONFIG = tiny_config()


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_checkpoint_comes_back_in_fp32_and_frozen(folder: Path):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.stats == STATS
    expected = random_model(CONFIG).state_dict()
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name
        assert tensor.dtype == torch.float32
    assert not any(p.requires_grad for p in checkpoint.model.parameters())
    assert not checkpoint.model.training


def test_extra_files_travel_along(tmp_path: Path):
    curve = tmp_path / "curve.jsonl"
    curve.write_text("{}\n", encoding="utf-8")
    save_checkpoint(
        tmp_path / "new",
        random_model(CONFIG),
        STATS,
        tokenizer_json(CONFIG),
        dtype=torch.float32,
        extra_files={"loss_curve.jsonl": curve},
    )
    assert (tmp_path / "new" / "loss_curve.jsonl").read_text(encoding="utf-8") == "{}\n"
    weight = load_checkpoint(tmp_path / "new").model.world_model.head.weight
    assert torch.equal(weight, random_model(CONFIG).world_model.head.weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "label_stats.json"])
def test_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_checkpoint(folder)


def test_folder_that_is_not_there_is_said_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_tensor_file_is_refused(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load_checkpoint(folder)


def test_wrong_shape_names_the_tensor(folder: Path):
    change_tensors(folder, lambda tensors: tensors.update({"world_model.head.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"world_model\.head\.bias has shape \[3\].* says \[32\]"):
        load_checkpoint(folder)


def test_missing_and_unexpected_keys_are_listed(folder: Path):
    def rename(tensors: dict) -> None:
        tensors["lora.weight"] = tensors.pop("vae.proj_up.bias")

    change_tensors(folder, rename)
    with pytest.raises(CheckpointError, match=r"1 keys missing \(first \['vae.proj_up.bias'\]\), 1 unexpected .*lora"):
        load_checkpoint(folder)


def test_config_of_another_model_does_not_fit(folder: Path):
    content = json.loads((folder / "config.json").read_bytes())
    content["world_model"]["intermediate"] = 64
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight has shape"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_refused(folder: Path, value: float):
    change_tensors(folder, lambda tensors: tensors["vae.proj_up.bias"].__setitem__(2, value))
    with pytest.raises(CheckpointError, match=r"vae\.proj_up\.bias holds NaN or infinity"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"latent_head": null, "rgb_head": null}'])
def test_broken_statistics_are_refused(folder: Path, content: str):
    (folder / "label_stats.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"label_stats\.json: not label statistics"):
        load_checkpoint(folder)


def test_broken_config_is_refused(folder: Path):
    (folder / "config.json").write_text('{"name": "x"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: not a model config"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_unusable_weights_are_not_saved_and_the_old_checkpoint_stays(tmp_path: Path, value: float):
    folder = tmp_path / "checkpoint"
    save_random_checkpoint(folder, CONFIG)
    before = (folder / "model.safetensors").read_bytes()
    model = random_model(CONFIG, seed=1)
    model.vae.proj_up.bias[0] = value
    with pytest.raises(CheckpointError, match=r"vae\.proj_up\.bias holds NaN, infinity or a value outside"):
        save_checkpoint(folder, model, STATS, tokenizer_json(CONFIG))
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_statistics_from_numpy_are_saved(tmp_path: Path):
    row = np.array([0.1, 0.2, 0.3])
    stats = LabelStats(mean_angles=tuple(row), std_angles=row, mean_t=row.astype(np.float32), std_t=tuple(row))
    save_checkpoint(
        tmp_path / "new", random_model(CONFIG), HeadStats(latent_head=stats, rgb_head=stats), tokenizer_json(CONFIG)
    )
    assert load_checkpoint(tmp_path / "new").stats.latent_head.mean_angles == (0.1, 0.2, 0.3)
