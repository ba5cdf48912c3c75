"""The released adapter: read what its distillation wrote, and write the file that the action decoder starts from.

Source: spec/training.md 3 (outputs), 4.4 (init).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from worldvln_edge.atomic import atomic_file
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.checkpoint_file import (
    CheckpointError,
    check_layout,
    kind_of,
    load_strictly,
    without_module_prefix,
)
from worldvln_edge.models.stored_tensors import FileTensors, TorchFile, read_all
from worldvln_edge.models.video_vae import VideoVAE

EXPORT_FILE = "infinitystar_up3_plus_adapter_latent2tokens.pt"
_ENTRIES = ("adapter_state_dict", "adapter", "state_dict")


@dataclass(frozen=True, kw_only=True)
class AdapterCheckpoint:
    """Contents of an adapter file; tensors are unread, optimiser states are left out."""

    path: Path
    adapter: FileTensors
    vae: FileTensors
    """The VAE that the features came from; empty where the file holds none."""
    epoch: int | None
    global_step: int | None


def read_adapter_checkpoint(path: Path, *, trust_pickle: bool = False) -> AdapterCheckpoint:
    """Read an adapter from a checkpoint of its training, from the exported file, or from a bare state dict.

    Args:
        path: `stage1_adapter_*.pt`, `infinitystar_up3_plus_adapter_latent2tokens.pt` or a state dict.
        trust_pickle: see `checkpoint_file.read_torch_file`.

    Raises:
        CheckpointError: unreadable, or without an adapter.
    """
    path = Path(path)
    file = TorchFile(path, trust_pickle=trust_pickle)
    content = file.content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict, found {type(content).__name__}; give an adapter checkpoint")
    entry = next((name for name in _ENTRIES if content.get(name) is not None), None)
    if entry is None and kind_of(key.removeprefix("module.") for key in map(str, content)) != "an adapter":
        found = ", ".join(sorted(map(str, content))[:8]) or "nothing"
        raise CheckpointError(
            f"{path}: no adapter: expected one of {', '.join(_ENTRIES)}, or a bare state dict, found {found}; give an "
            "adapter checkpoint"
        )
    has_vae = entry is not None and bool(content.get("vae_state_dict"))
    return AdapterCheckpoint(
        path=path,
        adapter=without_module_prefix(file.tensors(*([] if entry is None else [entry]))),
        vae=without_module_prefix(file.tensors("vae_state_dict")) if has_vae else {},
        epoch=_count(content, "epoch"),
        global_step=_count(content, "global_step", "step"),
    )


def load_adapter(adapter: Adapter, checkpoint: AdapterCheckpoint) -> None:
    """Copy the weights, strictly. Raises CheckpointError: keys or shapes differ from the configuration.

    An adapter with the skip branch (`skip.weight`) needs one that is built with `use_skip=True`.
    """
    check_layout(adapter.state_dict(), checkpoint.adapter, f"{checkpoint.path}: adapter")
    load_strictly(adapter, read_all(checkpoint.adapter), f"{checkpoint.path}: adapter")


def save_adapter_export(path: Path, adapter: Adapter, vae: VideoVAE, settings: Mapping[str, Any]) -> None:
    """Write VAE and adapter in the released layout, whole or not at all.

    Args:
        path: usually named `EXPORT_FILE`.
        adapter, vae: stored in float32, on the CPU.
        settings: plain values that are kept as `args`, without paths of this machine.
    """
    content = {
        "vae_state_dict": {name: tensor.detach().cpu().float() for name, tensor in vae.state_dict().items()},
        "adapter_state_dict": {name: tensor.detach().cpu().float() for name, tensor in adapter.state_dict().items()},
        "exported_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "args": dict(settings),
    }
    with atomic_file(path) as building:
        torch.save(content, building)


def _count(content: Mapping[str, Any], *names: str) -> int | None:
    return next((int(content[name]) for name in names if isinstance(content.get(name), int | float)), None)
