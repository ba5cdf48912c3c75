"""The released video VAE: read its containers and load them into `VideoVAE`.

Source: spec/video_vae.md 10; spec/action_decoder.md 3 (VAE part of the combined checkpoint).
"""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from worldvln_edge.models.checkpoint_file import (
    CheckpointError,
    TensorDict,
    check_shapes,
    read_safetensors,
    read_torch_file,
    tensor_dict,
    without_module_prefix,
)
from worldvln_edge.models.video_vae import VideoVAE

_REQUIRED = ("encoder.", "decoder.", "proj_down.", "proj_up.", "scale_learnable_parameters")
_ACTION_PART = ("decoder.", "proj_up.", "scale_learnable_parameters")
_NEVER_USED = ("proj_down_two.", "proj_up_two.")
_IGNORED = ("quantizer.", "quantize.")


def read_vae_tensors(path: Path, *, trust_pickle: bool = False) -> TensorDict:
    """The VAE's state dict from any of its containers.

    Args:
        path: `.pth`/`.pt` whose entry `vae` is the state dict (or that is one); a `.safetensors` file; a folder of
            shards with its index; or a folder that holds such a folder under the name `vae`.
        trust_pickle: see `checkpoint_file.read_torch_file`.

    Raises:
        CheckpointError: missing, damaged, or without a VAE.
    """
    path = Path(path)
    if path.is_dir():
        return without_module_prefix(read_safetensors(path / "vae" if (path / "vae").is_dir() else path))
    if path.suffix == ".safetensors":
        return without_module_prefix(read_safetensors(path))
    content = read_torch_file(path, trust_pickle=trust_pickle)
    if isinstance(content, Mapping) and "vae" in content:
        return tensor_dict(content["vae"], f"{path}: entry 'vae'")
    if isinstance(content, Mapping) and any(str(key).startswith(_REQUIRED) for key in without_module(content)):
        return tensor_dict(content, str(path))
    found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(f"{path}: no entry 'vae' and no VAE state dict (found {found})")


def without_module(content: Mapping) -> list[str]:
    """Keys of a mapping as text, without a leading `module.`."""
    return [str(key).removeprefix("module.") for key in content]


def load_vae(vae: VideoVAE, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy a released state dict into a VAE of the same configuration.

    Quantiser buffers are ignored, `proj_*_two` are optional (never used); anything else unexpected gives a warning.

    Raises:
        CheckpointError: a needed key is missing, or a shape differs; nothing was copied.
    """
    expected = vae.state_dict()
    needed = {key for key in expected if key.startswith(_REQUIRED)}
    if missing := sorted(needed - tensors.keys()):
        raise CheckpointError(f"{where}: {len(missing)} VAE tensors are missing (first {missing[:3]})")
    known = {key: tensor for key, tensor in tensors.items() if key in expected}
    check_shapes(expected, known, where)
    _warn_of(
        sorted(key for key in tensors if key not in expected and not key.startswith((*_IGNORED, *_NEVER_USED))), where
    )
    vae.load_state_dict(known, strict=False)


def vae_for_actions(base: VideoVAE, part: Mapping[str, Tensor], where: str) -> VideoVAE:
    """The VAE whose decoder feeds the action head: `base` with the tensors of a combined checkpoint put over it.

    Args:
        base: the encoding VAE; not modified.
        part: `vae_state_dict` of the combined checkpoint; may be empty.
        where: the checkpoint, for errors.

    Returns:
        `base` itself if nothing differs, so that one copy is kept; else a copy.

    Raises:
        CheckpointError: a decoder tensor that the configuration does not have, or of another shape.
    """
    expected = base.state_dict()
    part = {key: tensor for key, tensor in part.items() if not key.startswith((*_IGNORED, *_NEVER_USED))}
    _warn_of(sorted(key for key in part if not key.startswith(_ACTION_PART)), where)
    used = {key: tensor for key, tensor in part.items() if key.startswith(_ACTION_PART)}
    if unknown := sorted(used.keys() - expected.keys()):
        raise CheckpointError(
            f"{where}: {len(unknown)} decoder tensors are not in the configuration (first {unknown[:3]})"
        )
    check_shapes(expected, used, where)
    if all(torch.equal(expected[key].cpu(), tensor.cpu().to(expected[key].dtype)) for key, tensor in used.items()):
        return base
    vae = copy.deepcopy(base)
    vae.load_state_dict(used, strict=False)
    return vae


def _warn_of(keys: list[str], where: str) -> None:
    if keys:
        warnings.warn(f"{where}: {len(keys)} unexpected tensors are ignored (first {keys[:3]})", stacklevel=3)
