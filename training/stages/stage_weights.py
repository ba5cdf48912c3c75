"""What a finished stage leaves in its folder: `weights/`, with tensors, the model's configuration and statistics.

`model.safetensors` has the keys of a checkpoint folder (and those of readouts, which a later stage may start from),
`config.json` is the configuration of the model, `label_stats.json` the statistics of a head.
Source: spec/training.md 2.8 (export apart from checkpoints).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.atomic import atomic_directory
from worldvln_edge.config import ModelConfig
from worldvln_edge.models.worldvln import CONFIG_FILE, STATS_FILE, TENSOR_FILE

WEIGHTS = "weights"


class ChainError(ValueError):
    """A stage that lacks what it starts from, or an output that would lack a part or cannot be written."""


def is_finished(stage_folder: Path) -> bool:
    """Whether a stage, of whichever run, was trained to its end there."""
    return (stage_folder / WEIGHTS / CONFIG_FILE).is_file()


def save_weights(
    stage_folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, stats: LabelStats | None
) -> None:
    """Write `weights/`, whole or not at all. Raises ChainError where there is no room for it."""
    folder = stage_folder / WEIGHTS
    with explained_writes(folder), atomic_directory(folder, CONFIG_FILE) as building:
        tensors = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(tensors, building / TENSOR_FILE, metadata={"format": "pt"})
        if stats is not None:
            (building / STATS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(stats)) + b"\n")
        (building / CONFIG_FILE).write_bytes(config.to_json() + b"\n")


def read_weights(stage_folder: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU."""
    return load_file(stage_folder / WEIGHTS / TENSOR_FILE)


def read_stats(stage_folder: Path) -> LabelStats:
    """Statistics of the head that was trained there."""
    return msgspec.json.decode((stage_folder / WEIGHTS / STATS_FILE).read_bytes(), type=LabelStats)


@contextmanager
def explained_writes(folder: Path) -> Iterator[None]:
    """Turn what the system says about a folder's files into ChainError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ChainError(
            f"{folder} cannot be written ({error}); make room and give the same command again: nothing is trained twice"
        ) from error
