"""Reading tensor files that others wrote: `.pth` without running their code, and safetensors, single or sharded.

Source: spec/action_decoder.md 3 (allow-listed numpy arrays), spec/video_vae.md 10 (shards and aliases).
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TensorDict = dict[str, Tensor]

_INDEX_PATTERN = "*.safetensors.index.json"


class CheckpointError(ValueError):
    """Weights that cannot be used. The message says which file, what was found and what was expected."""


def read_torch_file(path: Path, *, trust_pickle: bool = False) -> Any:
    """What `torch.save` wrote: tensors, plain containers and numpy arrays, on the CPU.

    Args:
        path: the file.
        trust_pickle: unpickle without restriction. This runs code that the file contains: only for your own files.

    Raises:
        CheckpointError: missing, damaged, or holding other objects than listed above.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds objects other than tensors, plain containers and numpy arrays "
            f"({_first_line(error)}); if the file is your own, load it with trust_pickle, which runs its code"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: truncated or not a torch file ({_first_line(error)})") from error


def read_safetensors(path: Path) -> TensorDict:
    """Tensors of a `.safetensors` file, or of a folder with shards and their index; aliases are filled in.

    Metadata entries `alias -> stored key`, in the index or in a shard, name tensors that are shared under two names.

    Raises:
        CheckpointError: missing, damaged, an index that points outside the folder, or a shard without its keys.
    """
    path = Path(path)
    tensors: TensorDict = {}
    metadata: dict[str, str] = {}
    if path.is_dir():
        index = _read_index(path)
        metadata.update({k: v for k, v in index.get("metadata", {}).items() if isinstance(v, str)})
        for shard in sorted(set(index["weight_map"].values())):
            part, part_metadata = _read_one(path / shard)
            wanted = {key for key, file in index["weight_map"].items() if file == shard}
            if missing := sorted(wanted - part.keys() - part_metadata.keys()):
                raise CheckpointError(
                    f"{path / shard}: the index promises {len(missing)} keys that are not there "
                    f"(first {missing[:3]}); download the shard again"
                )
            tensors.update(part)
            metadata.update(part_metadata)
    else:
        tensors, metadata = _read_one(path)
    for alias, stored in metadata.items():
        if alias not in tensors and stored in tensors:
            tensors[alias] = tensors[stored]
    return tensors


def without_module_prefix(tensors: Mapping[str, Tensor]) -> TensorDict:
    """Keys without a leading `module.`, which data-parallel training puts there."""
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def tensor_dict(value: Any, where: str) -> TensorDict:
    """`value` as a state dict without `module.`. Raises CheckpointError if it is anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise CheckpointError(f"{where} must be a state dict (name -> tensor), found {type(value).__name__}")
    if wrong := [key for key, tensor in value.items() if not isinstance(tensor, Tensor)]:
        raise CheckpointError(f"{where}: {wrong[0]} is a {type(value[wrong[0]]).__name__}, not a tensor")
    return without_module_prefix(value)


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a module that has exactly these keys and shapes.

    Raises:
        CheckpointError: a key is missing or unexpected, or a shape differs; nothing was copied.
    """
    check_layout(module.state_dict(), tensors, where)
    module.load_state_dict(dict(tensors), strict=True)


def check_layout(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError unless `tensors` has exactly the keys and shapes of `expected`."""
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{where} does not fit the configuration: {len(missing)} keys missing (first {missing[:3]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:3]})"
        )
    check_shapes(expected, tensors, where)


def check_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError at the first tensor whose shape differs from its namesake in `expected`."""
    for key, tensor in tensors.items():
        if key in expected and tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{where}: {key} has shape {list(tensor.shape)}, the configuration says {list(expected[key].shape)}"
            )


def _read_index(folder: Path) -> dict[str, Any]:
    indices = sorted(folder.glob(_INDEX_PATTERN))
    if len(indices) != 1:
        shards = sorted(folder.glob("*.safetensors"))
        if not indices and len(shards) == 1:
            return {"weight_map": dict.fromkeys(_read_one(shards[0])[0], shards[0].name)}
        raise CheckpointError(f"{folder}: expected one {_INDEX_PATTERN}, found {len(indices)}")
    try:
        index = json.loads(indices[0].read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{indices[0]}: not JSON ({error})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{indices[0]}: no weight_map (key -> shard file)")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{indices[0]}: {shard!r} is not a file name in this folder")
    return index


def _read_one(path: Path) -> tuple[TensorDict, dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({_first_line(error)})") from error


def _numpy_globals() -> list[Any]:
    """What a pickled numpy array or scalar refers to, under the module names of numpy 1 and 2."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return allowed


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
