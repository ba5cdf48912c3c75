"""Reading tensor files that others wrote without running their code, and comparing what they hold with a configuration.

Source: spec/action_decoder.md 3 (allow-listed numpy arrays), spec/world_model.md 8 (torch files, strictness).
"""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

TensorDict = dict[str, Tensor]

# What the first key of a kind begins with, to say what was given in place of what.
_KINDS = {
    "a whole WorldVLN checkpoint": ("world_model.", "latent_head."),
    "a world model": ("block_chunks.", "blocks.0.mlp.gate_proj.", "semantic_head2."),
    "a video VAE": ("encoder.down_blocks.", "decoder.up_blocks."),
    "a T5 text encoder": ("encoder.block.", "shared."),
    "a TimesFormer": ("patch_embed.", "time_embed"),
    "an adapter": ("conv_a.",),
}
_LISTED = 3


class Shaped(Protocol):
    """Anything that stands for a tensor in a comparison of layouts."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class CheckpointError(ValueError):
    """Weights that cannot be used. The message says which file, what was found, what was expected, what to do."""


def read_torch_file(path: Path, *, trust_pickle: bool = False) -> Any:
    """What `torch.save` wrote: tensors, plain containers and numpy arrays, on the CPU.

    Tensors of the zip format (torch 1.6 and newer) are mapped, so that only those are read which are used.

    Args:
        path: the file.
        trust_pickle: unpickle a file with other objects too. This runs code that the file contains: only for your own.

    Raises:
        CheckpointError: missing, damaged, or holding other objects than listed above.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a torch file (.pt, .pth, .bin)")
    mapped = zipfile.is_zipfile(path)  # memory mapping works for the zip format only; older files are read whole
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if trust_pickle:
            return _unpickle(path, mapped)
        reason = "holds" if "nsupported" in str(error) else "is damaged or holds"
        raise CheckpointError(
            f"{path} {reason} objects other than tensors, plain containers and numpy arrays, and reading those could "
            f"run code ({first_line(error)}); if the file is your own, read it with --trust-pickle (trust_pickle=True)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _unpickle(path: Path, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        ImportError,
    ) as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    return f"{path} ({size} bytes) is truncated or not a torch file ({first_line(error)}); download it again"


def without_module_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without a leading `module.`, which data-parallel training puts there."""
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a module that has exactly these keys and shapes.

    Raises:
        CheckpointError: a key is missing or unexpected, or a shape differs; nothing was copied.
    """
    check_layout(module.state_dict(), tensors, where)
    module.load_state_dict(dict(tensors), strict=True)


def kind_of(keys: Iterable[str]) -> str | None:
    """Which network the keys of a state dict belong to, in words; None for none of ours."""
    keys = list(keys)
    for kind, starts in _KINDS.items():
        if any(key.startswith(starts) for key in keys):
            return kind
    return None


def check_layout(expected: Mapping[str, Shaped], tensors: Mapping[str, Shaped], where: str) -> None:
    """Compare keys and shapes.

    Args:
        expected: layout of the configured module.
        tensors: layout that was found.
        where: file and part, for the error.

    Raises:
        CheckpointError: `tensors` has not exactly the keys and shapes of `expected`.
    """
    wanted, found = kind_of(expected), kind_of(tensors)
    if wanted is not None and found is not None and wanted != found:
        raise CheckpointError(
            f"{where} holds {found}, but {wanted} is expected here (first key {min(tensors)}); give the file of each "
            "part under its own name"
        )
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        shape = f"; expected {missing[0]} of shape {list(expected[missing[0]].shape)}" if missing else ""
        raise CheckpointError(
            f"{where} does not fit the configuration ({len(expected)} keys): {len(missing)} keys missing "
            f"(first {missing[:_LISTED]}), {len(unexpected)} unexpected (first {unexpected[:_LISTED]}){shape}; choose "
            "the preset or config.json that belongs to these weights, or download the file again"
        )
    check_shapes(expected, tensors, where)


def check_shapes(expected: Mapping[str, Shaped], tensors: Mapping[str, Shaped], where: str) -> None:
    """Raise CheckpointError at the first tensor whose shape differs from its namesake in `expected`."""
    for key, tensor in tensors.items():
        if key in expected and tuple(tensor.shape) != tuple(expected[key].shape):
            raise CheckpointError(
                f"{where}: {key} has shape {list(tensor.shape)}, the configuration says {list(expected[key].shape)}; "
                "choose the preset or config.json that belongs to these weights"
            )


def first_line(error: Exception) -> str:
    """The first line of an error's text, cut to a readable length; the error's type when it has none."""
    text = str(error).strip()
    # torch wraps the reason ("Unsupported global: ...") in advice that would have the user unpickle.
    reason = next((line for line in text.splitlines() if "nsupported" in line), text.split("\n")[0])
    return reason.strip()[:300] or type(error).__name__


def _numpy_globals() -> list[Any]:
    """What a pickled numpy array or scalar refers to, under the module names of numpy 1 and 2."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return allowed
