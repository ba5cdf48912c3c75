"""The released action decoder: read its checkpoints, and load them into the two action heads.

Source: spec/action_decoder.md 3, 8; spec/training.md 4.8.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.checkpoint_file import (
    CheckpointError,
    check_layout,
    kind_of,
    load_strictly,
    without_module_prefix,
)
from worldvln_edge.models.stored_tensors import FileTensor, FileTensors, TorchFile, read_all

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


def open_rgb_checkpoint(path: Path, run_config: Path, *, trust_pickle: bool = False) -> tuple[FileTensors, LabelStats]:
    """The RGB head's TimesFormer, unread, and its statistics.

    Args:
        path: dict with `model_state_dict`, or a bare state dict.
        run_config: `run_config.json` with `label_stats`; all four entries are required.

    Raises:
        CheckpointError: unreadable, or statistics missing.
    """
    path, run_config = Path(path), Path(run_config)
    file = TorchFile(path, trust_pickle=trust_pickle)
    wrapped = isinstance(file.content, Mapping) and "model_state_dict" in file.content
    tensors = without_module_prefix(file.tensors("model_state_dict") if wrapped else file.tensors())
    try:
        run = json.loads(run_config.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_config}: not a readable JSON file ({error})") from error
    stats = run.get("label_stats") if isinstance(run, dict) else None
    return tensors, parse_label_stats(stats, f"{run_config}: label_stats")


def load_rgb_head(head: RgbActionHead, tensors: Mapping[str, FileTensor], where: str) -> None:
    """Copy the TimesFormer, strictly. Raises CheckpointError: keys or shapes differ from the configuration."""
    check_layout(head.tsformer.state_dict(), tensors, f"{where}: TimesFormer")
    load_strictly(head.tsformer, read_all(tensors), f"{where}: TimesFormer")


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
