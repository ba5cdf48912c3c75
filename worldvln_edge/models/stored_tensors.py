"""Tensors in files, found without reading them: safetensors, shard folders with or without index, torch files.

A `FileTensor` knows its shape, dtype and place and is read when asked. A container is a plain dictionary of them, so
renaming, leaving out, aliasing and laying one file over another are dictionary operations, and memory is bounded by
the tensors that the caller holds.
Source: spec/world_model.md 8 (indices, bare shards, aliases); spec/video_vae.md 10.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldvln_edge.models.checkpoint_file import CheckpointError, first_line, kind_of, read_torch_file

INDEX_FILE, TORCH_INDEX_FILE = "model.safetensors.index.json", "pytorch_model.bin.index.json"
TORCH_FILE = "pytorch_model.bin"
_INDEX_PATTERN = "*.safetensors.index.json"
_LISTED = 5
# A mapped file's pages count as ours once touched, so a mapping is given up after this much was read through it.
_MAPPED_BYTES = 512 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Shape and dtype, as stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class FileTensor(TensorInfo):
    """A tensor that lies in a file, or is made from tensors that do."""

    file: Path
    key: str
    """Its name in the file."""
    load: Callable[[], Tensor]
    """Reads it, unchecked."""

    def read(self) -> Tensor:
        """The tensor, on the CPU, in its stored dtype. Raises CheckpointError: unreadable, or a NaN or infinity."""
        tensor = self.load()
        if not _is_finite(tensor):
            raise CheckpointError(
                f"{self.file}: {self.key} holds NaN or infinity, which no trained weight does; download the file again"
            )
        return tensor


FileTensors = dict[str, FileTensor]


def read_all(tensors: Mapping[str, FileTensor]) -> dict[str, Tensor]:
    """Every tensor in memory. Raises CheckpointError: see `FileTensor.read`."""
    return {key: tensor.read() for key, tensor in tensors.items()}


def open_shards(folder: Path, *, trust_pickle: bool = False) -> FileTensors:
    """Tensors of a folder: safetensors with an index, all `*.safetensors`, torch shards with an index, or one `.bin`.

    Aliases (text entries `alias -> stored key` of the index's or a shard's metadata) are filled in.

    Args:
        folder: holds the shards.
        trust_pickle: see `checkpoint_file.read_torch_file`; for torch shards only.

    Raises:
        CheckpointError: no weights, an unusable index, a missing or damaged shard, a shard without its keys.
    """
    indices = sorted(folder.glob(_INDEX_PATTERN))
    if (folder / INDEX_FILE) in indices:
        indices = [folder / INDEX_FILE]
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: {len(indices)} indices, one is expected ({_first(indices)}); keep one set")
    if indices:
        keys_of, aliases = _read_index(indices[0])
        return _indexed(keys_of, aliases, open_safetensors_with_metadata)
    if shards := sorted(folder.glob("*.safetensors")):
        return _bare(shards)
    if (folder / TORCH_INDEX_FILE).is_file():
        keys_of, aliases = _read_index(folder / TORCH_INDEX_FILE)
        return _indexed(keys_of, aliases, lambda shard: (TorchFile(shard, trust_pickle=trust_pickle).tensors(), {}))
    if (folder / TORCH_FILE).is_file():
        return TorchFile(folder / TORCH_FILE, trust_pickle=trust_pickle).tensors()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    raise CheckpointError(
        f"{folder} holds no weights: expected *.safetensors (with or without {INDEX_FILE}), {TORCH_INDEX_FILE} or "
        f"{TORCH_FILE}; found {_first(folder.iterdir()) or 'nothing'}"
    )


def holds_shards(folder: Path) -> bool:
    """Whether a folder has safetensors shards, or an index of them."""
    return folder.is_dir() and (any(folder.glob("*.safetensors")) or any(folder.glob(_INDEX_PATTERN)))


def open_safetensors(path: Path) -> FileTensors:
    """Tensors of one file, aliases filled in. Raises CheckpointError: missing, truncated or not safetensors."""
    tensors, metadata = open_safetensors_with_metadata(path)
    return _with_aliases(tensors, metadata)


def open_safetensors_with_metadata(path: Path) -> tuple[FileTensors, dict[str, str]]:
    """Tensors of one file and its metadata. Raises CheckpointError: missing, truncated or not safetensors."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    tensors: FileTensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                view = file.get_slice(key)
                name = view.get_dtype()
                if name not in _DTYPES:
                    raise CheckpointError(f"{path}: {key} has dtype {name}, which is not supported; convert the file")
                tensors[key] = FileTensor(
                    shape=tuple(view.get_shape()),
                    dtype=_DTYPES[name],
                    file=path,
                    key=key,
                    load=partial(_read_safetensor, path, key),
                )
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_damaged(path, error)) from error


class TorchFile:
    """A torch file whose tensors are read one by one.

    Args:
        path: of the file.
        trust_pickle: see `checkpoint_file.read_torch_file`.

    Raises:
        CheckpointError: missing, damaged, or holding other objects than allowed.
    """

    def __init__(self, path: Path, *, trust_pickle: bool = False):
        self.path = Path(path)
        self._trust_pickle = trust_pickle
        self._mapped: Any = read_torch_file(self.path, trust_pickle=trust_pickle)
        self._read_bytes = 0

    @property
    def content(self) -> Any:
        """The unpickled object. Its tensors are mapped: do not keep them, take them from `tensors`."""
        if self._mapped is None:
            self._mapped = read_torch_file(self.path, trust_pickle=self._trust_pickle)
        return self._mapped

    def tensors(self, *entry: str) -> FileTensors:
        """The state dict below nested keys, or the object itself.

        Raises:
            CheckpointError: it is not a dictionary from names to tensors.
        """
        state = self._entry(entry)
        where = f"{self.path}: entry '{'.'.join(entry)}'" if entry else f"{self.path}"
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{where} must be a state dict (name -> tensor), found a {type(state).__name__}")
        wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if wrong:
            raise CheckpointError(
                f"{where} must be a state dict (name -> tensor), found a dict with keys {_first(state)}"
                f"{self._parts(state)}, and {wrong[0]} is a {type(state[wrong[0]]).__name__}; give the "
                "file of the part that is asked for"
            )
        return {
            key: FileTensor(
                shape=tuple(value.shape),
                dtype=value.dtype,
                file=self.path,
                key=".".join((*entry, key)),
                load=partial(self._read, (*entry, key)),
            )
            for key, value in state.items()
        }

    @staticmethod
    def _parts(state: Mapping) -> str:
        """Which networks lie one level deeper, for the error."""
        dicts = {key: value for key, value in state.items() if isinstance(value, Mapping)}
        kinds = [f"{key} is {kind}" for key, value in dicts.items() if (kind := kind_of(map(str, value)))]
        return f" ({', '.join(kinds)})" if kinds else ""

    def _entry(self, entry: tuple[str, ...]) -> Any:
        value = self.content
        for key in entry:
            value = value[key]
        return value

    def _read(self, entry: tuple[str, ...]) -> Tensor:
        # A copy, so that the mapping can be given up while the tensor lives.
        tensor = self._entry(entry).detach().clone(memory_format=torch.contiguous_format)
        self._read_bytes += tensor.nbytes
        if self._read_bytes > _MAPPED_BYTES:
            self._mapped, self._read_bytes = None, 0
        return tensor


def _read_safetensor(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    size = path.stat().st_size if path.is_file() else 0
    return f"{path}: truncated or not a safetensors file ({size} bytes; {first_line(error)}); download it again"


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()
    # One pass without temporaries; NaN comes through.
    lowest, highest = torch.aminmax(tensor)
    return bool(torch.isfinite(lowest)) and bool(torch.isfinite(highest))


def _read_index(index: Path) -> tuple[dict[Path, list[str]], dict[str, str]]:
    try:
        content = json.loads(index.read_bytes())
        metadata = dict(content.get("metadata") or {})
        names = {str(key): str(name) for key, name in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no shard index (needs an object weight_map): {error!r}") from error
    if not names:
        raise CheckpointError(f"{index} is no shard index: its weight_map is empty; download it again")
    keys_of: dict[Path, list[str]] = {}
    for key, name in names.items():
        if Path(name).name != name:
            raise CheckpointError(
                f"{index}: shard {name!r} of {key} lies outside the folder; keep shards beside the index"
            )
        keys_of.setdefault(index.parent / name, []).append(key)
    if missing := [shard for shard in keys_of if not shard.is_file()]:
        raise CheckpointError(f"{index} names shards that are not here: {_first(missing)}; download them again")
    return keys_of, metadata


def _indexed(
    keys_of: dict[Path, list[str]],
    metadata: dict[str, Any],
    open_shard: Callable[[Path], tuple[FileTensors, dict[str, str]]],
) -> FileTensors:
    tensors: FileTensors = {}
    for shard, keys in keys_of.items():
        present, own_metadata = open_shard(shard)
        metadata = own_metadata | metadata
        if absent := [key for key in keys if key not in present and key not in metadata]:
            raise CheckpointError(f"{shard} lacks keys its index promises: {_first(absent)}; download it again")
        tensors |= {key: present[key] for key in keys if key in present}
    return _with_aliases(tensors, metadata)


def _bare(shards: list[Path]) -> FileTensors:
    tensors: FileTensors = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        present, own_metadata = open_safetensors_with_metadata(shard)
        if twice := sorted(present.keys() & tensors.keys()):
            raise CheckpointError(
                f"{shard.name} and {tensors[twice[0]].file.name} in {shard.parent} both hold {twice[0]}, and no "
                f"{INDEX_FILE} says which is meant; keep one set of shards in the folder"
            )
        tensors |= present
        metadata |= own_metadata
    return _with_aliases(tensors, metadata)


def _with_aliases(tensors: FileTensors, metadata: Mapping[str, Any]) -> FileTensors:
    for alias, stored in metadata.items():
        if alias != "format" and alias not in tensors and isinstance(stored, str) and stored in tensors:
            tensors[alias] = tensors[stored]
    return tensors


def _first(names: Any) -> str:
    texts = [name.name if isinstance(name, Path) else str(name) for name in names]
    more = f", ... ({len(texts)} in all)" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more
