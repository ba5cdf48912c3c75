"""From flights to a checkpoint in one call, stage by stage, at the size of a test."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import random_frames, tiny_config

from worldvln_edge.config import GenerationConfig, ModelConfig
from worldvln_edge.export.graph_sources import graph_sources
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.training.sim.instructions import instruction_vocabulary
from worldvln_edge.training.stages.loop import TrainingDivergedError
from worldvln_edge.training.stages.pipeline import DeviceError, Recipe, WorkFolderError, train_model


def _config() -> ModelConfig:
    tiny = tiny_config()
    return msgspec.structs.replace(tiny, text_encoder=msgspec.structs.replace(tiny.text_encoder, vocabulary=256))


CONFIG = _config()


def _recipe() -> Recipe:
    recipe = Recipe().scaled(0.003)
    return replace(
        recipe,
        vae=replace(recipe.vae, window=5, encoder_window=5, batch=2, encoder_batch=2),
        backbone=replace(recipe.backbone, batch=2),
        action=replace(recipe.action, windows=8),
        rgb=replace(recipe.rgb, windows=8),
        feature_flights=6,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flights")
    rng = np.random.default_rng(0)
    words = instruction_vocabulary()
    np.savez(
        folder / "flights-0.npz",
        frames=np.stack([np.stack(random_frames(CONFIG, 13, seed=i)) for i in range(8)]),
        actions=rng.normal(size=(8, 12, 6)).astype(np.float32) * 10,
        poses=np.zeros((8, 13, 6)),
        instructions=np.array([" ".join(rng.choice(words, 4)) for _ in range(8)]),
        kinds=np.array(["forward"] * 8),
    )
    return folder


def _train(data: Path, folder: Path, config: ModelConfig = CONFIG, **options) -> Path:
    arguments = {"seed": 1, "recipe": _recipe(), **options}
    train_model(config, data, folder / "work", folder / "checkpoint", **arguments)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory) -> Path:
    return _train(data, tmp_path_factory.mktemp("run"))


def _stages(folder: Path) -> list[str]:
    lines = (folder / "work" / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["stage"] for line in lines]


def test_the_checkpoint_loads_and_traces(trained: Path):
    checkpoint = load_checkpoint(trained / "checkpoint")
    assert checkpoint.config == CONFIG
    assert {"loss_curve.jsonl", "run.json"} <= {path.name for path in (trained / "checkpoint").iterdir()}
    assert len(list(graph_sources(checkpoint.model))) == 13


def test_every_stage_left_its_weights_and_its_curve(trained: Path):
    assert set(_stages(trained)) == {"vae_encoder", "vae", "sft", "action", "rgb_head"}
    names = {path.name for path in (trained / "work").iterdir()}
    saved = ("vae", "sft", "action", "rgb_head")
    assert names == {"run.json", "loss_curve.jsonl", *(f"{stage}.safetensors" for stage in saved)}


def test_finished_stages_are_not_repeated(data: Path, trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "work" / "rgb_head.safetensors").unlink()
    before = _stages(tmp_path)
    _train(data, tmp_path)
    assert _stages(tmp_path)[len(before) :] == ["rgb_head"]
    old = load_file(trained / "checkpoint" / "model.safetensors")
    new = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(torch.equal(old[k], new[k]) for k in old if not k.startswith("rgb_head."))


def test_resumed_run_gives_the_weights_of_an_unbroken_one(data: Path, trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "work" / "rgb_head.safetensors").unlink()
    _train(data, tmp_path)
    old = load_file(trained / "checkpoint" / "model.safetensors")
    new = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 2}, "seed"),
        ({"limit": 7}, "flights"),
        ({"recipe": replace(_recipe(), feature_flights=5)}, "recipe"),
        ({"config": msgspec.structs.replace(CONFIG, generation=GenerationConfig(cfg=7.0))}, "model_sha256"),
    ],
)
def test_work_of_another_run_is_refused(data: Path, trained: Path, change: dict, key: str):
    with pytest.raises(WorkFolderError, match=f"holds another run: {key} of .* differ"):
        _train(data, trained, **change)


def test_work_of_other_flights_is_refused_although_they_are_as_many(data: Path, trained: Path, tmp_path: Path):
    arrays = dict(np.load(data / "flights-0.npz"))
    arrays["actions"][0, 0, 0] += 1
    np.savez(tmp_path / "flights-0.npz", **arrays)
    with pytest.raises(WorkFolderError, match="holds another run: data_fingerprint of"):
        _train(tmp_path, trained)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "describes no run"), (None, "holds weights but no run.json")]
)
def test_work_of_an_unknown_run_is_refused(data: Path, tmp_path: Path, content: str | None, message: str):
    work = tmp_path / "work"
    work.mkdir()
    (work / "vae.safetensors").touch()
    if content is not None:
        (work / "run.json").write_text(content)
    with pytest.raises(WorkFolderError, match=message):
        _train(data, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(data: Path, tmp_path: Path):
    with pytest.raises(DeviceError, match=r"no device 'cuda' for training here .*; give --device cpu"):
        _train(data, tmp_path, device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_training_on_a_gpu_gives_a_checkpoint_that_loads(data: Path, tmp_path: Path):
    _train(data, tmp_path, device="cuda")
    assert load_checkpoint(tmp_path / "checkpoint").config == CONFIG
    assert set(_stages(tmp_path)) == {"vae_encoder", "vae", "sft", "action", "rgb_head"}


def test_scaled_recipe_keeps_everything_but_the_steps():
    scaled = Recipe().scaled(0.5)
    assert scaled.backbone.optimiser.steps == Recipe().backbone.optimiser.steps // 2
    assert replace(scaled.backbone, optimiser=Recipe().backbone.optimiser) == Recipe().backbone
    assert Recipe().scaled(0).vae.optimiser.steps == Recipe().scaled(0).vae.encoder.steps == 2


def test_a_run_that_diverges_stops_and_leaves_no_checkpoint(data: Path, tmp_path: Path):
    recipe = _recipe()
    broken = replace(recipe.vae, optimiser=replace(recipe.vae.optimiser, max_bad_steps=2), commitment=float("nan"))
    with pytest.raises(TrainingDivergedError, match="vae: 2 steps in a row"):
        _train(data, tmp_path, recipe=replace(recipe, vae=broken))
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "work" / "vae.safetensors").exists()
