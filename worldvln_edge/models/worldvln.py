"""All networks of WorldVLN in one module, and the checkpoint folder that holds them.

A checkpoint folder: `config.json` (`ModelConfig`), `model.safetensors` (keys `text_encoder.`, `world_model.`, `vae.`,
`latent_head.`, `rgb_head.`), `tokenizer.json`, `label_stats.json` (`HeadStats`), and what the trainer adds.
Source: spec/README.md (decisions), spec/action_decoder.md 3.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.atomic import atomic_directory
from worldvln_edge.config import ModelConfig
from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.models.world_model import WorldModel

CONFIG_FILE, TENSOR_FILE = "config.json", "model.safetensors"
TOKENIZER_FILE, STATS_FILE = "tokenizer.json", "label_stats.json"


class HeadStats(msgspec.Struct, frozen=True, kw_only=True):
    """Label statistics of the two action heads."""

    latent_head: LabelStats
    rgb_head: LabelStats


class WorldVLN(nn.Module):
    """Text encoder, world model, video VAE and the two action heads of one `ModelConfig`.

    Args:
        config: sizes.
        time_embed_std: of both heads, see `TimesFormer`.
    """

    def __init__(self, config: ModelConfig, *, time_embed_std: float = 0.02):
        super().__init__()
        decoder = config.action_decoder
        self.config = config
        self.text_encoder = TextEncoder(config.text_encoder)
        self.world_model = WorldModel(config.world_model)
        self.vae = VideoVAE(config.video_vae)
        self.latent_head = LatentActionHead(decoder, config.video_vae.feature_channels, time_embed_std=time_embed_std)
        self.rgb_head = RgbActionHead(decoder, time_embed_std=time_embed_std)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    config: ModelConfig
    model: WorldVLN
    stats: HeadStats
    tokenizer_file: Path
    tensor_file: Path
    missing_parts: frozenset[str] = frozenset()
    """Parts that `model` does not have; see `checkpoint_source.CheckpointSource`."""


def save_checkpoint(
    folder: Path,
    model: WorldVLN,
    stats: HeadStats,
    tokenizer_json: str,
    *,
    dtype: torch.dtype = torch.float16,
    extra_files: dict[str, Path] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: where; an existing checkpoint is replaced.
        model: the networks.
        stats: label statistics of both heads.
        tokenizer_json: text of `tokenizer.json`.
        dtype: of the stored tensors.
        extra_files: name in the folder -> file to copy (loss curve, model card).

    Raises:
        CheckpointError: a tensor is not finite, or does not fit the range of `dtype`.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        if not torch.isfinite(stored).all():
            raise CheckpointError(f"tensor {name} holds NaN, infinity or a value outside {dtype}; nothing was written")
        tensors[name] = stored.contiguous().clone()
    with atomic_directory(folder, CONFIG_FILE) as building:
        save_file(tensors, building / TENSOR_FILE, metadata={"format": "pt"})
        (building / TENSOR_FILE).chmod(0o644)
        (building / CONFIG_FILE).write_bytes(model.config.to_json() + b"\n")
        (building / STATS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(stats), indent=2) + b"\n")
        (building / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
        for name, source in (extra_files or {}).items():
            shutil.copyfile(source, building / name)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, strictly, into float32 modules in eval mode.

    Raises:
        CheckpointError: a file is missing or truncated, keys or shapes differ from the configuration, or a number is
            not finite.
        ConfigError: `config.json` does not parse.
    """
    # Imported here because a source is made of the classes above.
    from worldvln_edge.models.checkpoint_source import load_source, open_checkpoint

    return load_source(open_checkpoint(folder))
