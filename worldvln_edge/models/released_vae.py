"""The released video VAE: read its containers and load them into `VideoVAE`.

Source: spec/video_vae.md 10; spec/world_model.md 8; spec/action_decoder.md 3 (VAE part of the combined checkpoint).
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from worldvln_edge.models.checkpoint_file import (
    CheckpointError,
    Shaped,
    TensorDict,
    check_shapes,
    kind_of,
    without_module_prefix,
)
from worldvln_edge.models.stored_tensors import (
    FileTensor,
    FileTensors,
    TorchFile,
    holds_shards,
    open_safetensors,
    open_shards,
    read_all,
)
from worldvln_edge.models.video_vae import VideoVAE

_REQUIRED = ("encoder.", "decoder.", "proj_down.", "proj_up.", "scale_learnable_parameters")
_ACTION_PART = ("decoder.", "proj_up.", "scale_learnable_parameters")
_NEVER_USED = ("proj_down_two.", "proj_up_two.")
_IGNORED = ("quantizer.", "quantize.")
_ENTRIES = (("trainer", "vae_local"), ("vae_state_dict",), ("vae",), ("ema",))
_SCALE, _PROJECTION = "scale_learnable_parameters", "proj_up.weight"

AnyTensor = TypeVar("AnyTensor", bound=Shaped)


def read_vae_tensors(path: Path, *, trust_pickle: bool = False) -> TensorDict:
    """The VAE's state dict, in memory. See `open_vae_tensors`."""
    return read_all(open_vae_tensors(path, trust_pickle=trust_pickle))


def open_vae_tensors(path: Path, *, trust_pickle: bool = False) -> FileTensors:
    """The VAE's state dict as its container holds it, unread.

    Args:
        path: torch file whose first of the entries `trainer.vae_local`, `vae_state_dict`, `vae`, `ema` that is not
            empty is the state dict, or that is one; a `.safetensors` file; a folder of shards; or a folder that holds
            such a folder under the name `vae`.
        trust_pickle: see `checkpoint_file.read_torch_file`.

    Raises:
        CheckpointError: missing, damaged, or without a VAE.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no video VAE at {path}; give a torch file, a .safetensors file or a folder of shards")
    if path.is_dir():
        part = path / "vae"
        return without_module_prefix(open_shards(part if holds_shards(part) else path, trust_pickle=trust_pickle))
    if path.suffix == ".safetensors":
        return without_module_prefix(open_safetensors(path))
    file = TorchFile(path, trust_pickle=trust_pickle)
    content = file.content
    for entry in _ENTRIES:
        value = content
        for key in entry:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and (not isinstance(value, Mapping) or value):
            return without_module_prefix(file.tensors(*entry))
    if isinstance(content, Mapping) and any(k.startswith(_REQUIRED) for k in without_module_prefix(_texts(content))):
        return without_module_prefix(file.tensors())
    found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(f"{path}: no entry 'vae' and no VAE state dict (found {found}); give the VAE's own file")


def complete_vae(expected: Mapping[str, Shaped], stored: FileTensors, where: str) -> FileTensors:
    """Exactly the tensors of `VideoVAE.state_dict()`, in its order, unread; `proj_*_two` may be absent (zeros).

    Raises:
        CheckpointError: see `load_vae`.
    """
    known = select_vae_tensors(expected, stored, where)
    for key in sorted(expected.keys() - known.keys()):
        shape = tuple(expected[key].shape)
        file = next(iter(known.values())).file
        known[key] = FileTensor(shape=shape, dtype=torch.float32, file=file, key=key, load=partial(torch.zeros, shape))
    return {key: known[key] for key in expected}


def select_vae_tensors(
    expected: Mapping[str, Shaped], tensors: Mapping[str, AnyTensor], where: str
) -> dict[str, AnyTensor]:
    """The tensors that a VAE of this layout takes. Raises CheckpointError: see `load_vae`."""
    needed = {key for key in expected if key.startswith(_REQUIRED)}
    if missing := sorted(needed - tensors.keys()):
        kind = kind_of(tensors)
        other = f"; this file holds {kind}, give the video VAE" if kind not in (None, "a video VAE") else ""
        raise CheckpointError(
            f"{where}: {len(missing)} VAE tensors are missing (first {missing[:3]}; {missing[0]} of shape "
            f"{list(expected[missing[0]].shape)} is expected){other}"
        )
    known = {key: tensor for key, tensor in tensors.items() if key in expected}
    check_shapes(expected, known, where)
    _warn_of(
        sorted(key for key in tensors if key not in expected and not key.startswith((*_IGNORED, *_NEVER_USED))), where
    )
    return known


def load_vae(vae: VideoVAE, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy a released state dict into a VAE of the same configuration.

    Quantiser buffers are ignored, `proj_*_two` are optional (never used); anything else unexpected gives a warning.

    Raises:
        CheckpointError: a needed key is missing, or a shape differs; nothing was copied.
    """
    vae.load_state_dict(select_vae_tensors(vae.state_dict(), tensors, where), strict=False)


def select_decoder_tensors(
    expected: Mapping[str, Shaped], part: Mapping[str, AnyTensor], where: str
) -> dict[str, AnyTensor]:
    """The tensors of a combined checkpoint's VAE part that replace the base's: its decoder side.

    Raises:
        CheckpointError: a decoder tensor that the configuration does not have, or of another shape.
    """
    part = {key: tensor for key, tensor in part.items() if not key.startswith((*_IGNORED, *_NEVER_USED))}
    _warn_of(sorted(key for key in part if not key.startswith(_ACTION_PART)), where)
    used = {key: tensor for key, tensor in part.items() if key.startswith(_ACTION_PART)}
    if unknown := sorted(used.keys() - expected.keys()):
        raise CheckpointError(
            f"{where}: {len(unknown)} decoder tensors are not in the configuration (first {unknown[:3]}); choose the "
            "preset or config.json that belongs to these weights"
        )
    check_shapes(expected, used, where)
    return used


def with_action_decoder(base: FileTensors, part: FileTensors, where: str) -> FileTensors:
    """One VAE that encodes as `base` and decodes as the combined checkpoint's part; unread.

    Encoder and decoder share `scale_learnable_parameters[0]`: the encoder multiplies by it, the decoder divides by it
    before `proj_up`. The base's value stays, and a part with another value has the quotient folded into
    `proj_up.weight`, which gives the same decoder up to rounding.

    Args:
        base: complete, see `complete_vae`.
        part: `vae_state_dict` of the combined checkpoint; may be empty.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: see `select_decoder_tensors`; while reading: a scale of 0.
    """
    used = select_decoder_tensors(base, part, where)
    scale = used.pop(_SCALE, None)
    merged = base | used
    if scale is not None:
        projection = merged[_PROJECTION]
        merged[_PROJECTION] = replace(
            projection, load=partial(_folded_projection, projection, base[_SCALE], scale, where)
        )
    return merged


def vae_for_actions(base: VideoVAE, part: Mapping[str, Tensor], where: str) -> VideoVAE:
    """The VAE whose decoder feeds the action head: `base` with the tensors of a combined checkpoint put over it.

    Args:
        base: the encoding VAE; not modified.
        part: `vae_state_dict` of the combined checkpoint; may be empty.
        where: the checkpoint, for errors.

    Returns:
        `base` itself if nothing differs, so that one copy is kept; else a copy.

    Raises:
        CheckpointError: see `select_decoder_tensors`.
    """
    expected = base.state_dict()
    used = select_decoder_tensors(expected, part, where)
    if all(torch.equal(expected[key].cpu(), tensor.cpu().to(expected[key].dtype)) for key, tensor in used.items()):
        return base
    vae = copy.deepcopy(base)
    vae.load_state_dict(used, strict=False)
    return vae


def _folded_projection(projection: FileTensor, base_scale: FileTensor, own_scale: FileTensor, where: str) -> Tensor:
    weight = projection.load()
    base, own = float(base_scale.read().float()[0]), float(own_scale.read().float()[0])
    if base == own:
        return weight
    if own == 0:
        raise CheckpointError(f"{where}: {_SCALE}[0] is 0, and the decoder divides by it; download the file again")
    return (weight.double() * (base / own)).to(weight.dtype)


def _texts(content: Mapping) -> dict[str, None]:
    return dict.fromkeys(map(str, content))


def _warn_of(keys: list[str], where: str) -> None:
    if keys:
        warnings.warn(f"{where}: {len(keys)} unexpected tensors are ignored (first {keys[:3]})", stacklevel=3)
