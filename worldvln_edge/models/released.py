"""Released world-model weights, in every container they come in.

Accepted: a Hugging Face repository folder (transformer in `gpt/`), a shard folder with or without an index, one
`.safetensors` file, and a torch file (training checkpoint with `trainer.gpt_fsdp`, or a slim state dict).
Source: spec/world_model.md 8.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from worldvln_edge.config import WorldModelConfig
from worldvln_edge.models.checkpoint_file import CheckpointError, check_layout
from worldvln_edge.models.stored_tensors import (
    FileTensor,
    FileTensors,
    TorchFile,
    holds_shards,
    open_safetensors,
    open_shards,
)
from worldvln_edge.models.world_model import WorldModel, initial_cfg_uncond

_IGNORED = frozenset({"lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen"})


def load_world_model(
    path: str | Path,
    config: WorldModelConfig,
    block_dtype: torch.dtype = torch.bfloat16,
    trust_pickle: bool = False,
) -> WorldModel:
    """Build a WorldModel on the CPU from released weights.

    Args:
        path: any container named above.
        config: sizes the weights must have.
        block_dtype: dtype of the blocks; everything else is fp32, whatever the file holds.
        trust_pickle: allow a torch file to run code while it is read. Only for files you made yourself.

    Raises:
        CheckpointError: see `open_world_model`; or a tensor with NaN or infinity.
    """
    stored = open_world_model(Path(path), config, trust_pickle=trust_pickle)
    with torch.device("meta"):
        model = WorldModel(config)
    # Cast one by one: the file's own dtype may be twice as large as what is kept.
    state = {key: _cast(key, tensor.read(), block_dtype) for key, tensor in stored.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def open_world_model(path: Path, config: WorldModelConfig, *, trust_pickle: bool = False) -> FileTensors:
    """Exactly the tensors of `WorldModel(config).state_dict()`, in its order, unread, with every tolerance applied.

    Tolerances: `cfg_uncond` with more or fewer rows, leftover keys of training, no `sos_token` (zeros), aliases.

    Args:
        path: any container named above.
        config: sizes the weights must have.
        trust_pickle: see `load_world_model`.

    Raises:
        CheckpointError: nothing there, unreadable or truncated file, missing or unexpected keys, other shapes.
    """
    path = Path(path)
    tensors = {
        key: tensor
        for key, tensor in open_world_model_file(path, trust_pickle=trust_pickle).items()
        if key not in _IGNORED
    }
    with torch.device("meta"):
        expected = WorldModel(config).state_dict()
    learned = tensors.get("cfg_uncond")
    if learned is not None and len(learned.shape) == 2 and learned.shape[1] == config.text_channels:
        tensors["cfg_uncond"] = replace(
            learned, shape=tuple(expected["cfg_uncond"].shape), load=partial(fit_cfg_uncond, learned, config)
        )
    if "sos_token" not in tensors:
        shape = tuple(expected["sos_token"].shape)
        tensors["sos_token"] = FileTensor(
            shape=shape, dtype=torch.float32, file=path, key="sos_token", load=partial(torch.zeros, shape)
        )
    check_layout(expected, tensors, f"{path} (world model)")
    return {key: tensors[key] for key in expected}


def open_world_model_file(path: Path, *, trust_pickle: bool = False) -> FileTensors:
    """The tensors of any container named above, unread, under the names that they have there.

    Raises:
        CheckpointError: nothing there, unreadable or truncated file, a torch file of something else.
    """
    if not path.exists():
        raise CheckpointError(f"no weights at {path}; give a folder of shards, a .safetensors file or a torch file")
    if path.is_dir():
        part = path / "gpt"
        return open_shards(part if holds_shards(part) else path, trust_pickle=trust_pickle)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    file = TorchFile(path, trust_pickle=trust_pickle)
    if not isinstance(file.content, Mapping) or "trainer" not in file.content:
        return file.tensors()
    trainer = file.content["trainer"]
    if not isinstance(trainer, Mapping) or "gpt_fsdp" not in trainer:
        found = ", ".join(map(str, trainer)) if isinstance(trainer, Mapping) else type(trainer).__name__
        raise CheckpointError(
            f"{path}: key trainer has no state dict gpt_fsdp (found {found or 'nothing'}); give a checkpoint of the "
            "transformer's training"
        )
    return file.tensors("trainer", "gpt_fsdp")


def fit_cfg_uncond(learned: FileTensor, config: WorldModelConfig) -> Tensor:
    """`cfg_uncond` cut to the configured rows, or filled up with the first value of the missing ones."""
    rows = learned.load()[: config.text_max_tokens]
    return torch.cat((rows, initial_cfg_uncond(config)[rows.shape[0] :].to(rows.dtype)))


def _cast(key: str, tensor: Tensor, block_dtype: torch.dtype) -> Tensor:
    return tensor.to(block_dtype if key.startswith(("block_chunks.", "blocks.")) else torch.float32)
