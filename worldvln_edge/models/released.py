"""Loader for released world-model weights, in every container they come in.

Accepted: a Hugging Face repository folder (transformer in `gpt/`, VAE in `vae/`), a shard folder with or without an
index, one `.safetensors` file, and a torch file (training checkpoint with `trainer.gpt_fsdp`, or a slim state dict).
Source: spec/world_model.md 8.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldvln_edge.config import WorldModelConfig
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.world_model import WorldModel, initial_cfg_uncond

_INDEX = "model.safetensors.index.json"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_IGNORED = frozenset({"lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen"})
_LISTED = 5


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
        FileNotFoundError: nothing at `path`.
        CheckpointError: unreadable or truncated file, missing or unexpected keys, other shapes.
    """
    with torch.device("meta"):
        model = WorldModel(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tensors, aliases = read_transformer_tensors(path, trust_pickle)
    state: dict[str, Tensor] = {}
    for key, tensor in tensors:
        # Cast one by one: the file's own dtype may be twice as large as what is kept.
        state[key] = _cast(key, tensor, block_dtype)
    for alias, canonical in aliases.items():
        if alias not in state and canonical in state:
            state[alias] = state[canonical].clone()
    state = _apply_tolerances(state, config)
    _check_keys(state, expected, Path(path))
    model.load_state_dict(state, strict=True, assign=True)
    return model


def read_transformer_tensors(
    path: str | Path, trust_pickle: bool = False
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, str]]:
    """Find the transformer's tensors in a container.

    Returns:
        (iterator over (key, CPU tensor), alias -> canonical key).

    Raises:
        FileNotFoundError, CheckpointError: see `load_world_model`; some only while iterating.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.is_dir():
        parts = (path / "gpt", path / "vae")
        if all(_holds_shards(part) for part in parts):
            path = path / "gpt"
        return _shard_folder(path, trust_pickle)
    if path.suffix == ".safetensors":
        return _read_shards({path: None}), _shard_aliases([path])
    return iter(_torch_state(path, trust_pickle).items()), {}


def _holds_shards(folder: Path) -> bool:
    return folder.is_dir() and (any(folder.glob("*.safetensors")) or (folder / _INDEX).is_file())


def _shard_folder(folder: Path, trust_pickle: bool) -> tuple[Iterator[tuple[str, Tensor]], dict[str, str]]:
    if (folder / _INDEX).is_file():
        keys_of, aliases = _read_index(folder / _INDEX)
        return _read_shards(keys_of), _shard_aliases(list(keys_of)) | aliases
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return _read_shards(dict.fromkeys(shards)), _shard_aliases(shards)
    if (folder / _TORCH_INDEX).is_file():
        keys_of, aliases = _read_index(folder / _TORCH_INDEX)
        return _read_torch_shards(keys_of, trust_pickle), aliases
    raise CheckpointError(
        f"{folder} holds no weights: expected *.safetensors (with or without {_INDEX}), {_TORCH_INDEX}, or the folders "
        "gpt/ and vae/ that both hold *.safetensors"
    )


def _read_index(index: Path) -> tuple[dict[Path, list[str]], dict[str, str]]:
    try:
        content = json.loads(index.read_text())
        weight_map, metadata = content["weight_map"], content.get("metadata") or {}
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no shard index (needs an object weight_map): {error}") from error
    keys_of: dict[Path, list[str]] = {}
    for key, name in names.items():
        if Path(name).name != name:
            raise CheckpointError(
                f"{index}: shard {name!r} of {key} lies outside the folder; keep shards beside the index"
            )
        keys_of.setdefault(index.parent / name, []).append(key)
    missing = [shard.name for shard in keys_of if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index} names shards that are not here: {_first(missing)}; download them again")
    return keys_of, _alias_pairs(metadata)


def _alias_pairs(metadata: dict) -> dict[str, str]:
    pairs = metadata.items()
    return {
        alias: name for alias, name in pairs if isinstance(name, str) and isinstance(alias, str) and alias != "format"
    }


def _open_shard(shard: Path) -> safe_open:
    try:
        return safe_open(str(shard), framework="pt", device="cpu")
    except SafetensorError as error:
        size = shard.stat().st_size
        raise CheckpointError(f"{shard} ({size} bytes) is truncated or no safetensors file: {error}") from error


def _shard_aliases(shards: list[Path]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for shard in shards:
        with _open_shard(shard) as file:
            aliases |= _alias_pairs(file.metadata() or {})
    return aliases


def _read_shards(keys_of: Mapping[Path, list[str] | None]) -> Iterator[tuple[str, Tensor]]:
    for shard, keys in keys_of.items():
        with _open_shard(shard) as file:
            present = set(file.keys())
            absent = [key for key in keys or () if key not in present]
            if absent:
                raise CheckpointError(f"{shard} lacks keys its index promises: {_first(absent)}; download it again")
            for key in sorted(present) if keys is None else keys:
                yield key, file.get_tensor(key)


def _read_torch_shards(keys_of: dict[Path, list[str]], trust_pickle: bool) -> Iterator[tuple[str, Tensor]]:
    for shard, keys in keys_of.items():
        state = _torch_state(shard, trust_pickle)
        absent = [key for key in keys if key not in state]
        if absent:
            raise CheckpointError(f"{shard} lacks keys its index promises: {_first(absent)}; download it again")
        yield from ((key, state[key]) for key in keys)


def _torch_state(path: Path, trust_pickle: bool) -> dict[str, Tensor]:
    # Memory mapping works for the zip format only; older files are read whole.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            raise CheckpointError(
                f"{path} is damaged or holds more than tensors, dicts, strings and numbers; reading it could run code. "
                "If you made this file yourself, load it with trust_pickle=True and save it again as safetensors"
            ) from error
        content = _unpickle(path, mapped)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is truncated or no torch file: {error}") from error
    if isinstance(content, dict) and "trainer" in content:
        trainer = content["trainer"]
        if not isinstance(trainer, dict) or not isinstance(trainer.get("gpt_fsdp"), dict):
            found = _first([str(key) for key in trainer]) if isinstance(trainer, dict) else type(trainer).__name__
            raise CheckpointError(f"{path}: key trainer has no state dict gpt_fsdp (found {found})")
        content = trainer["gpt_fsdp"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = type(content).__name__
        if isinstance(content, dict):
            found = "dict with keys " + _first([str(key) for key in content])
        raise CheckpointError(f"{path}: expected a state dict, or one under trainer.gpt_fsdp; found a {found}")
    return content


def _unpickle(path: Path, mapped: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ImportError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be unpickled: {error}") from error


def _cast(key: str, tensor: Tensor, block_dtype: torch.dtype) -> Tensor:
    return tensor.to(block_dtype if key.startswith(("block_chunks.", "blocks.")) else torch.float32)


def _apply_tolerances(state: dict[str, Tensor], config: WorldModelConfig) -> dict[str, Tensor]:
    state = {key: tensor for key, tensor in state.items() if key not in _IGNORED}
    state.setdefault("sos_token", torch.zeros(1, 1, config.width))
    learned = state.get("cfg_uncond")
    if learned is not None and learned.ndim == 2 and learned.shape[1] == config.text_channels:
        own = initial_cfg_uncond(config)[learned.shape[0] :]
        state["cfg_uncond"] = torch.cat((learned[: config.text_max_tokens], own))
    return state


def _check_keys(state: dict[str, Tensor], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    problems = []
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if found:
            problems.append(f"{len(found)} {label}: {_first(found)}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit the configured world model ({len(expected)} keys). {'. '.join(problems)}. "
            "Choose the preset or config.json that belongs to these weights"
        )


def _first(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
