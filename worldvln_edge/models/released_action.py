"""The released action decoder: read its checkpoints, load them into the two action heads, and write one.

Source: spec/action_decoder.md 3, 8; spec/training.md 4.8.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.atomic import atomic_file
from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.checkpoint_file import (
    CheckpointError,
    check_layout,
    kind_of,
    load_strictly,
    without_module_prefix,
)
from worldvln_edge.models.stored_tensors import FileTensor, FileTensors, TorchFile, read_all
from worldvln_edge.models.timesformer import TimesFormer
from worldvln_edge.models.video_vae import VideoVAE

COMBINED_FILE = "stage2_latent2action_combined.pt"
_FORMAT = "stage2_latent2action_combined_v2_resumable"
_VAE_PART = ("proj_up.", "post_quant_conv.", "decoder.", "scale_learnable_parameters")
_STATS_FIELDS = ("mean_angles", "std_angles", "mean_t", "std_t")
_VAE_DEFAULTS = {
    "semantic_scale_dim": 16,
    "detail_scale_dim": 64,
    "use_learnable_dim_proj": 0,
    "detail_scale_min_tokens": 350,
    "use_feat_proj": 2,
    "semantic_scales": 11,
    "infinitystar_vae_path": None,
    "infinitystar_vae_type": 64,
}


@dataclass(frozen=True, kw_only=True)
class CombinedCheckpoint:
    """Contents of a combined (Stage 2) checkpoint; tensors are unread, optimiser states are left out."""

    path: Path
    tsformer: FileTensors
    adapter: FileTensors
    vae: FileTensors
    """Decoder tensors to put over the base VAE (`released_vae.with_action_decoder`); may be empty."""
    label_stats: LabelStats | None
    label_stats_source: str
    format: str
    vae_settings: dict[str, Any] = field(default_factory=dict)
    """How the VAE was built: `args` over the defaults, and the two top-level entries over `args`."""


def read_combined_checkpoint(path: Path, *, trust_pickle: bool = False) -> CombinedCheckpoint:
    """Read a combined checkpoint of any of the three released formats.

    Args:
        path: `.pt` or `.pth`.
        trust_pickle: see `checkpoint_file.read_torch_file`.

    Raises:
        CheckpointError: unreadable, no dict, or without TimesFormer or adapter.
    """
    path = Path(path)
    file = TorchFile(path, trust_pickle=trust_pickle)
    content = file.content
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a dict, found {type(content).__name__}; give a combined (Stage 2) checkpoint"
        )
    tsformer = _first_dict(file, "TimesFormer", ("model_state_dict", "tsformer_state_dict"))
    adapter = _first_dict(file, "adapter", ("adapter_state_dict", "state_dict"))
    stats = content.get("label_stats")
    if stats is None:
        warnings.warn(f"{path}: no label_stats; the head's outputs will be taken as rad and m directly", stacklevel=2)
    args = content.get("args") or {}
    args = args if isinstance(args, Mapping) else vars(args)
    settings = {key: args.get(key, default) for key, default in _VAE_DEFAULTS.items()}
    for key in ("infinitystar_vae_path", "infinitystar_vae_type"):
        if content.get(key) is not None:
            settings[key] = content[key]
    return CombinedCheckpoint(
        path=path,
        tsformer=tsformer,
        adapter=adapter,
        vae=without_module_prefix(file.tensors("vae_state_dict")) if content.get("vae_state_dict") else {},
        label_stats=None if stats is None else parse_label_stats(stats, f"{path}: label_stats"),
        label_stats_source=str(content.get("label_stats_source") or ""),
        format=str(content.get("format") or ""),
        vae_settings=settings,
    )


def load_latent_head(head: LatentActionHead, checkpoint: CombinedCheckpoint) -> None:
    """Copy TimesFormer and adapter, strictly. Raises CheckpointError: keys or shapes differ from the configuration.

    An adapter with the skip branch (`skip.weight`) needs a head built with `use_skip=True`.
    """
    parts = {"adapter": (head.adapter, checkpoint.adapter), "TimesFormer": (head.tsformer, checkpoint.tsformer)}
    for name, (module, stored) in parts.items():
        check_layout(module.state_dict(), stored, f"{checkpoint.path}: {name}")
    for name, (module, stored) in parts.items():
        load_strictly(module, read_all(stored), f"{checkpoint.path}: {name}")


def save_combined_checkpoint(
    path: Path,
    head: LatentActionHead,
    vae: VideoVAE,
    stats: LabelStats,
    *,
    stats_source: str,
    epoch: int,
    global_step: int,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a combined (Stage 2) checkpoint in the released layout, whole or not at all.

    Statistics are tensors, so that a plain safe load reads the file; there are no paths of this machine in it, and the
    optimiser's state is not part of it (the trainer keeps that in its own file).

    Args:
        path: usually named `COMBINED_FILE`.
        head: adapter and TimesFormer.
        vae: its decoder side is stored.
        stats: label statistics that the head was trained with.
        stats_source: where they came from, in words.
        epoch, global_step: finished ones.
        settings: plain values that are kept as `args`, over the defaults of the VAE's construction.
    """

    def stored(module: nn.Module, *starts: str) -> dict[str, Tensor]:
        tensors = module.state_dict().items()
        return {name: tensor.detach().cpu().float() for name, tensor in tensors if name.startswith(starts or ("",))}

    sizes, tsformer = head.config.latent_head, stored(head.tsformer)
    content = {
        "format": _FORMAT,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "epoch": epoch,
        "global_step": global_step,
        "infinitystar_vae_path": None,
        "infinitystar_vae_type": vae.config.raw_channels,
        "tsformer_pretrained": None,
        "adapter_ckpt": None,
        "model_config": {
            "num_frames": sizes.window,
            "embed_dim": sizes.width,
            "patch_size": sizes.patch,
            "W_grid": sizes.grid_hw[1],
        },
        "vae_state_dict": stored(vae, *_VAE_PART),
        "label_stats": {name: torch.tensor(getattr(stats, name), dtype=torch.float32) for name in _STATS_FIELDS},
        "label_stats_source": stats_source,
        "adapter_state_dict": stored(head.adapter),
        "tsformer_state_dict": tsformer,
        "model_state_dict": tsformer,
        "args": _VAE_DEFAULTS | {"infinitystar_vae_type": vae.config.raw_channels} | dict(settings or {}),
    }
    with atomic_file(path) as building:
        torch.save(content, building)


def open_timesformer(path: Path, *, trust_pickle: bool = False) -> FileTensors:
    """A TimesFormer, unread, from a dict with `model_state_dict` or a bare state dict.

    Raises:
        CheckpointError: unreadable, or no state dict.
    """
    file = TorchFile(Path(path), trust_pickle=trust_pickle)
    wrapped = isinstance(file.content, Mapping) and "model_state_dict" in file.content
    return without_module_prefix(file.tensors("model_state_dict") if wrapped else file.tensors())


def load_timesformer(tsformer: TimesFormer, tensors: Mapping[str, FileTensor], where: str) -> None:
    """Copy the weights, strictly. Raises CheckpointError: keys or shapes differ from the configuration."""
    check_layout(tsformer.state_dict(), tensors, f"{where}: TimesFormer")
    load_strictly(tsformer, read_all(tensors), f"{where}: TimesFormer")


def open_rgb_checkpoint(path: Path, run_config: Path, *, trust_pickle: bool = False) -> tuple[FileTensors, LabelStats]:
    """The RGB head's TimesFormer, unread, and its statistics.

    Args:
        path: dict with `model_state_dict`, or a bare state dict.
        run_config: `run_config.json` with `label_stats`; all four entries are required.

    Raises:
        CheckpointError: unreadable, or statistics missing.
    """
    tensors, run_config = open_timesformer(path, trust_pickle=trust_pickle), Path(run_config)
    try:
        run = json.loads(run_config.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_config}: not a readable JSON file ({error})") from error
    stats = run.get("label_stats") if isinstance(run, dict) else None
    return tensors, parse_label_stats(stats, f"{run_config}: label_stats")


def load_rgb_head(head: RgbActionHead, tensors: Mapping[str, FileTensor], where: str) -> None:
    """Copy the TimesFormer, strictly. Raises CheckpointError: keys or shapes differ from the configuration."""
    load_timesformer(head.tsformer, tensors, where)


def parse_label_stats(value: Any, where: str) -> LabelStats:
    """Statistics from a dict of four arrays, tensors or lists of 3 finite numbers; deviations must be positive.

    Raises:
        CheckpointError: anything else.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} must hold {', '.join(_STATS_FIELDS)}; found {type(value).__name__}")
    fields = {}
    for name in _STATS_FIELDS:
        if name not in value:
            raise CheckpointError(f"{where}: {name} is missing")
        numbers = value[name].tolist() if isinstance(value[name], Tensor | np.ndarray) else value[name]
        try:
            row = np.asarray(numbers, np.float64)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {name} must be 3 numbers") from error
        if row.shape != (3,) or not np.isfinite(row).all() or (name.startswith("std") and (row <= 0).any()):
            above = " above 0" if name.startswith("std") else ""
            raise CheckpointError(f"{where}: {name} must be 3 finite numbers{above}, found {numbers}")
        fields[name] = tuple(float(number) for number in row)
    return msgspec.convert(fields, LabelStats)


def _first_dict(file: TorchFile, what: str, keys: tuple[str, ...]) -> FileTensors:
    for key in keys:
        if file.content.get(key) is not None:
            return without_module_prefix(file.tensors(key))
    names = list(map(str, file.content))
    kind = kind_of(names)
    found = f"{kind} ({len(names)} keys)" if kind else ", ".join(sorted(names)[:8]) or "nothing"
    raise CheckpointError(
        f"{file.path}: no {what}: expected one of {', '.join(keys)}, found {found}; give a combined "
        "(Stage 2) checkpoint"
    )
