"""A trained model that began as released files: what was trained is written, the rest is named where it lies.

The folder holds `released.json`, which every command that takes a checkpoint reads.
Source: spec/training.md 2.8 (the frozen VAE is never written again), 4.8.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.atomic import atomic_directory
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.checkpoint_source import RELEASED_FILE, ReleasedParts
from worldvln_edge.models.released_action import COMBINED_FILE, save_combined_checkpoint
from worldvln_edge.models.released_adapter import EXPORT_FILE, save_adapter_export
from worldvln_edge.models.worldvln import WorldVLN

BACKBONE_FILE = "backbone.safetensors"
_PATHS = ("backbone", "text_encoder", "action_decoder", "vae", "tokenizer", "rgb_head", "rgb_run_config")


@dataclass(frozen=True, kw_only=True)
class ReleasedFolder:
    """A folder with `released.json`."""

    folder: Path
    parts: ReleasedParts


def read_released(folder: Path) -> ReleasedFolder | None:
    """The parts that a folder's `released.json` names, None where it has none.

    Raises:
        CheckpointError: a file that is no such list.
    """
    file = folder / RELEASED_FILE
    if not file.is_file():
        return None
    try:
        parts = msgspec.json.decode(file.read_bytes(), type=ReleasedParts)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not a list of released parts ({error})") from error
    return ReleasedFolder(folder=folder, parts=parts)


def write_released(
    out: Path,
    base: ReleasedFolder,
    model: WorldVLN,
    *,
    has_backbone: bool,
    action_stats: LabelStats | None,
    distilled: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the trained parts and a `released.json` that names them and the parts of `base`.

    Args:
        out: folder; an earlier one of this kind is replaced.
        base: what the training began with; its files stay where they are.
        model: trained.
        has_backbone: the world model was trained; its blocks are stored in bf16, as they are served.
        action_stats: statistics of the latent head if it was trained, else None.
        distilled: state dict of the adapter after its distillation, which the action head may have trained further.
            Written for `--adapter`; nothing in `released.json` names it.

    Raises:
        CheckpointError: a weight that is not finite.
    """
    target = Path(out).resolve()
    with atomic_directory(target, RELEASED_FILE) as building:
        paths: dict[str, str | None] = {name: _relative(base, name, target) for name in _PATHS}
        # The VAE that lies in the folder of the backbone stays there when the backbone is another.
        own_vae = base.folder / base.parts.backbone / "vae"
        if paths["vae"] is None and own_vae.is_dir():
            paths["vae"] = os.path.relpath(own_vae.resolve(), target)
        if paths["tokenizer"] is None:
            text = base.folder / base.parts.text_encoder
            tokenizer = (text if text.is_dir() else text.parent) / "tokenizer.json"
            paths["tokenizer"] = os.path.relpath(tokenizer.resolve(), target)
        if has_backbone:
            paths["backbone"] = BACKBONE_FILE
            save_file(_stored(model.world_model.state_dict()), building / BACKBONE_FILE, metadata={"format": "pt"})
        if action_stats is not None:
            paths["action_decoder"] = COMBINED_FILE
            save_combined_checkpoint(
                building / COMBINED_FILE,
                model.latent_head,
                model.vae,
                action_stats,
                stats_source="worldvln-edge train action",
                epoch=0,
                global_step=0,
            )
        if distilled is not None:
            adapter = copy.deepcopy(model.latent_head.adapter)
            adapter.load_state_dict(dict(distilled))
            save_adapter_export(building / EXPORT_FILE, adapter, model.vae, {"preset": model.config.name})
        parts = msgspec.structs.replace(base.parts, **paths)
        (building / RELEASED_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(parts), indent=2) + b"\n")


def _relative(base: ReleasedFolder, name: str, target: Path) -> str | None:
    path = getattr(base.parts, name)
    return None if path is None else os.path.relpath((base.folder / path).resolve(), target)


def _stored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} holds NaN or infinity; nothing was written")
        dtype = torch.bfloat16 if name.startswith(("block_chunks.", "blocks.")) else torch.float32
        found[name] = tensor.detach().to("cpu", dtype).contiguous()
    return found
