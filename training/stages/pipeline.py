"""From flights to a checkpoint: VAE, latents, backbone, features, action heads, one after the other.

Every finished stage is saved in the work folder; a run that was stopped goes on behind the last finished stage.
Source: spec/training.md 0 (stages), 8.3 (small presets).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from worldvln_edge.atomic import atomic_file
from worldvln_edge.config import ModelConfig
from worldvln_edge.models.worldvln import HeadStats, WorldVLN, save_checkpoint
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.sim.instructions import instruction_vocabulary
from worldvln_edge.training.sim.shards import fingerprint_shards, list_shards
from worldvln_edge.training.stages.action import ActionTrainingConfig, cache_features, train_latent_head
from worldvln_edge.training.stages.backbone import BackboneTrainingConfig, TextBatch, train_backbone
from worldvln_edge.training.stages.flight_data import load_flights
from worldvln_edge.training.stages.loop import OptimiserConfig
from worldvln_edge.training.stages.rgb_head import RgbTrainingConfig, train_rgb_head
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer
from worldvln_edge.training.stages.vae import VaeTrainingConfig, encode_flights, train_vae

TIME_EMBED_STD = 0.7  # spec/training.md 8.6: small heads learn motion only from a large time embedding


class WorkFolderError(ValueError):
    """The work folder belongs to another run."""


class DeviceError(ValueError):
    """The device that was asked for is not here."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on besides preset, data and seed."""

    vae: VaeTrainingConfig = field(default_factory=VaeTrainingConfig)
    backbone: BackboneTrainingConfig = field(default_factory=BackboneTrainingConfig)
    action: ActionTrainingConfig = field(default_factory=ActionTrainingConfig)
    rgb: RgbTrainingConfig = field(default_factory=RgbTrainingConfig)
    feature_flights: int = 2000  # flights whose decoder features are cached; 0.8 MB each for `nano`

    def scaled(self, share: float) -> Recipe:
        """The same recipe with every stage's steps multiplied (rehearsals, tests)."""

        def fewer(optimiser: OptimiserConfig) -> OptimiserConfig:
            return replace(optimiser, steps=max(2, int(optimiser.steps * share)))

        def shorter(stage):
            return replace(stage, optimiser=fewer(stage.optimiser))

        return replace(
            self,
            vae=replace(shorter(self.vae), encoder=fewer(self.vae.encoder)),
            backbone=shorter(self.backbone),
            action=shorter(self.action),
            rgb=shorter(self.rgb),
        )


def train_model(
    config: ModelConfig,
    data: Path,
    work: Path,
    out: Path,
    *,
    seed: int = 0,
    recipe: Recipe,
    limit: int | None = None,
    device: str = "cpu",
) -> None:
    """Train every network of a small preset and write the checkpoint folder `out`.

    Args:
        config: preset.
        data: folder of flight shards.
        work: finished stages and the loss curve.
        out: checkpoint folder.
        seed: of initial weights and all draws.
        recipe: stages.
        limit: use at most that many flights.
        device: where the networks are trained, e.g. "cuda"; flights stay in the computer's memory, batches move.
            Initial weights and batches do not depend on it; rounding and stochastic depth do. A stopped run may go on
            on another device.

    Raises:
        DeviceError: this machine, or this build of PyTorch, has no such device.
        FlightDataError: data that does not fit the preset.
        WorkFolderError: `work` holds a run with other settings.
        TrainingDivergedError: losses that are not finite.
    """
    where = _device(device)
    work.mkdir(parents=True, exist_ok=True)
    curve = work / "loss_curve.jsonl"
    flights = load_flights(data, num_frames=config.horizon.num_frames, image_hw=config.image_hw, limit=limit)
    stats = flights.label_stats()
    torch.manual_seed(seed)
    model = WorldVLN(config, time_embed_std=TIME_EMBED_STD).to(where)
    tag = tagged_prompt("", config.horizon)
    tokenizer = build_word_tokenizer(instruction_vocabulary(), tag, config.text_encoder.vocabulary)
    text = TextBatch(flights.instructions, PromptTokenizer(tokenizer, config.world_model.text_max_tokens), config)

    run = {
        "seed": seed,
        "preset": config.name,
        "model_sha256": hashlib.sha256(config.to_json()).hexdigest(),
        "flights": len(flights),
        "data_fingerprint": fingerprint_shards(list_shards(data)),
        "recipe": asdict(recipe),
    }
    stages = _Stages(work, run)
    if not stages.load("vae", model.vae):
        train_vae(model.vae, config, flights, recipe.vae, curve, seed=seed)
        stages.save("vae", model.vae)
    backbone = nn.ModuleDict({"text_encoder": model.text_encoder, "world_model": model.world_model})
    if not stages.load("sft", backbone):
        latents = encode_flights(model.vae, flights)
        train_backbone(
            model.text_encoder, model.world_model, config, latents, text, recipe.backbone, curve, seed=seed + 1
        )
        stages.save("sft", backbone)
    if not stages.load("action", model.latent_head):
        used = flights.take(np.arange(min(recipe.feature_flights, len(flights))))
        latents = encode_flights(model.vae, used)
        networks = (model.vae.eval(), model.world_model.eval(), model.text_encoder.eval())
        cache = cache_features(*networks, config, latents, text, seed=seed)
        train_latent_head(model.latent_head, config, used, cache, stats, recipe.action, curve, seed=seed + 3)
        stages.save("action", model.latent_head)
    if not stages.load("rgb_head", model.rgb_head):
        train_rgb_head(model.rgb_head, flights, stats, recipe.rgb, curve, seed=seed + 2)
        stages.save("rgb_head", model.rgb_head)
    save_checkpoint(
        out,
        model,
        HeadStats(latent_head=stats, rgb_head=stats),
        tokenizer.to_str(pretty=True),
        extra_files={"loss_curve.jsonl": curve, "run.json": stages.run_file},
    )


class _Stages:
    """Finished stages of one run; a work folder of another run (seed, preset, model, data, recipe) is refused."""

    def __init__(self, work: Path, run: dict[str, Any]):
        self._work = work
        self._seed = int(run["seed"])
        self.run_file = work / "run.json"
        text = json.dumps(run, indent=1) + "\n"
        if self.run_file.exists():
            changed = _changed_keys(self.run_file, json.loads(text))
            if changed:
                raise WorkFolderError(
                    f"{work} holds another run: {', '.join(changed)} of {self.run_file} differ; "
                    "give an empty --work folder"
                )
            return
        if any(work.glob("*.safetensors")):
            raise WorkFolderError(f"{work} holds weights but no run.json that says of which run; give an empty folder")
        with atomic_file(self.run_file) as building:
            building.write_text(text, encoding="utf-8")

    def load(self, stage: str, module: nn.Module) -> bool:
        """Load a finished stage; or say that it is still to do, with the draws that it always begins with."""
        path = self._work / f"{stage}.safetensors"
        if not path.exists():
            torch.manual_seed(self._seed + sum(stage.encode()))  # stochastic depth draws from the global generator
            return False
        module.load_state_dict(load_file(path))
        module.eval()
        return True

    def save(self, stage: str, module: nn.Module) -> None:
        path = self._work / f"{stage}.safetensors"
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
        with atomic_file(path) as building:
            save_file(tensors, building)


def _changed_keys(run_file: Path, run: dict[str, Any]) -> list[str]:
    """Keys in which the run of a file is not `run`."""
    try:
        found = json.loads(run_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WorkFolderError(f"{run_file}: not JSON ({error}); give an empty --work folder") from error
    if not isinstance(found, dict):
        raise WorkFolderError(f"{run_file}: describes no run; give an empty --work folder")
    return [key for key in {**run, **found} if key not in found or key not in run or found[key] != run[key]]


def _device(name: str) -> torch.device:
    """Raise DeviceError unless tensors can be put there: here, rather than after the flights are read."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"no device {name!r} for training here ({reason}); give --device cpu") from error
    return device
