"""Weights of a base model as the beginning of training: what fits is taken, and what does not is said.

Loading for flight is strict (`released.py`). A base model may have other heads, because its latents have other
channels or bits; its blocks must fit.
Source: spec/training.md 2.7 (init).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from worldvln_edge.models.checkpoint_file import CheckpointError, check_shapes
from worldvln_edge.models.released import fit_cfg_uncond, open_world_model_file
from worldvln_edge.models.world_model import WorldModel

_MAY_DIFFER = ("word_embed.", "head.", "semantic_head2.")
_BLOCKS = ("block_chunks.", "blocks.")
_OLD_HEAD, _HEAD = "semantic_head.", "semantic_head2."
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """What became of the tensors of a file."""

    loaded: tuple[str, ...]
    reshaped: tuple[str, ...]
    """Of another shape in the file; they keep their initial values."""
    missing: tuple[str, ...]
    """Not in the file; they keep their initial values."""
    unused: tuple[str, ...]
    """In the file, but not in the model."""


def load_base_weights(model: WorldModel, path: Path, *, trust_pickle: bool = False) -> BaseWeights:
    """Copy what fits into a model that has its initial weights.

    Of `word_embed`, `head` and `semantic_head2`, tensors of another shape are left out; `semantic_head` is an older
    name of `semantic_head2`; `cfg_uncond` may have more or fewer rows.

    Args:
        model: on any device, of any dtype; changed in place.
        path: any container that `released.py` names.
        trust_pickle: see `released.load_world_model`.

    Raises:
        CheckpointError: unreadable; a block is missing, or another tensor has another shape; NaN or infinity. The
            model may have taken some tensors by then.
    """
    expected = model.state_dict()
    tensors = open_world_model_file(Path(path), trust_pickle=trust_pickle)
    if not any(key.startswith(_HEAD) for key in tensors):
        tensors = {_HEAD + k.removeprefix(_OLD_HEAD) if k.startswith(_OLD_HEAD) else k: t for k, t in tensors.items()}
    learned = tensors.get("cfg_uncond")
    if learned is not None and len(learned.shape) == 2 and learned.shape[1] == model.config.text_channels:
        tensors["cfg_uncond"] = replace(
            learned,
            shape=tuple(expected["cfg_uncond"].shape),
            load=partial(fit_cfg_uncond, learned, model.config),
        )
    missing = tuple(sorted(expected.keys() - tensors.keys()))
    lost = [key for key in missing if key.startswith(_BLOCKS)]
    if lost:
        raise CheckpointError(
            f"{path} (base model): {len(lost)} tensors of blocks are missing (first {lost[:_LISTED]}); choose the "
            "preset that has the base model's depth and chunks"
        )
    reshaped = tuple(
        key
        for key, tensor in tensors.items()
        if key in expected and key.startswith(_MAY_DIFFER) and tuple(tensor.shape) != tuple(expected[key].shape)
    )
    fitting = {key: tensor for key, tensor in tensors.items() if key in expected and key not in reshaped}
    check_shapes(expected, fitting, f"{path} (base model)")
    with torch.no_grad():
        for key, tensor in fitting.items():
            expected[key].copy_(tensor.read())
    return BaseWeights(
        loaded=tuple(fitting),
        reshaped=reshaped,
        missing=missing,
        unused=tuple(sorted(tensors.keys() - expected.keys())),
    )
