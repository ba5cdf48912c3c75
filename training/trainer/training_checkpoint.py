"""Checkpoints of a run in progress: a folder per step, written aside and renamed, for one process or many.

`step-00001000/` holds the tensors in the format of torch.distributed.checkpoint (each rank writes its shards, any
number of ranks reads them) and `progress.json` with everything else. A folder that has its final name is whole.
PyTorch describes the shards in a pickled file: read checkpoints of your own runs only, and pass on `model.safetensors`.
Source: spec/training.md 2.8.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.ema import MovingAverage
from worldvln_edge.training.trainer.loading import Position

PROGRESS_FILE = "progress.json"
_RNG = "rng"
_STEP, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the ones before it are whole."""


class CheckpointReadError(ValueError):
    """A checkpoint that cannot be gone on from."""


class Best(msgspec.Struct, frozen=True, kw_only=True):
    metric: str
    value: float
    step: int


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything of a run that is not a tensor. Random draws need no more than the position: see `trainer.stage`."""

    step: int
    """Optimiser steps done, skipped ones included."""
    epoch: int
    """Of the next step."""
    step_in_epoch: int
    run_sha256: str = ""
    """Of the run's identity (recipe, data, seed); set when it is saved."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Of training, over all its processes one after the other."""
    best: Best | None = None
    curves: dict[str, tuple[float, int]] = {}
    """Sum and count of every loss since the last row of the loss curve."""
    optimised: list[str] = []
    """Parameters that the optimiser has moments of: frozen and unused ones have none."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.step_in_epoch)

    @property
    def last_epoch(self) -> int:
        """Epoch of the last step that was done."""
        return self.epoch if self.step_in_epoch else self.epoch - 1


class TrainingCheckpoints:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run.
        ranks: all of them call every method together.
        keep_last: how many to keep beside the best one.
        run_sha256: hash of what the run depends on; a checkpoint with another one is refused.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep_last: int, run_sha256: str):
        self._folder, self._ranks, self._keep_last, self._run_sha256 = folder, ranks, keep_last, run_sha256

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first: those that the first rank sees, on every rank."""
        return self._ranks.gather(self._found() if self._ranks.is_first else None)[0]

    def save(
        self,
        progress: Progress,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        average: MovingAverage | None,
    ) -> None:
        """Write the checkpoint of `progress.step`, then delete what is no longer kept.

        Raises:
            CheckpointWriteError: the disk is full or cannot be written to; older checkpoints stay as they were.
        """
        target = self.path(progress.step)
        if progress.step in self.steps():
            return
        state = _state(network, average) | _moments(network, optimiser)
        progress = msgspec.structs.replace(
            progress, optimised=_optimised(network, optimiser), run_sha256=self._run_sha256
        )
        building = self._folder / f".{target.name}.building"
        self._together(building, lambda: self._prepare(building, target))
        error = None
        try:
            with _without_rank_warning():
                dcp.save(state, checkpoint_id=building, no_dist=self._ranks.count == 1)
        except (OSError, RuntimeError, CheckpointException) as failed:
            error = _reason(failed)
        self._agree(building, error, needed=_bytes(state))
        self._together(building, lambda: self._finish(building, target, progress))

    def load(
        self, step: int, network: nn.Module, optimiser: torch.optim.Optimizer, average: MovingAverage | None
    ) -> Progress:
        """Put the checkpoint of `step` into the network, the optimiser and the average, on any number of ranks.

        Raises:
            CheckpointReadError: files are missing or broken, hold other tensors, or are of another run.
        """
        folder = self.path(step)
        try:
            progress = msgspec.json.decode((folder / PROGRESS_FILE).read_bytes(), type=Progress)
            if progress.run_sha256 != self._run_sha256:
                raise ValueError("it is of another recipe, seed or data")
            _make_moments(network, optimiser, progress.optimised)
            state = _state(network, average) | _moments(network, optimiser)
            with _without_rank_warning():
                dcp.load(state, checkpoint_id=folder, no_dist=self._ranks.count == 1)
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
            raise CheckpointReadError(
                f"{folder} cannot be read ({_reason(error)}); delete it to go on from the checkpoint before it"
            ) from error
        torch.set_rng_state(state[_RNG])
        return progress

    def _found(self) -> list[int]:
        """Steps that this rank sees; another machine may see a folder of the network later than its writer."""
        return sorted(int(path.parent.name.partition("-")[2]) for path in self._folder.glob(f"step-*/{PROGRESS_FILE}"))

    def _prepare(self, building: Path, target: Path) -> None:
        for unfinished in (*self._folder.glob(".step-*"), target):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        building.mkdir(parents=True)

    def _finish(self, building: Path, target: Path, progress: Progress) -> None:
        with (building / PROGRESS_FILE).open("wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(progress), indent=1) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(building, target)
        steps = self._found()
        kept = set(steps[-self._keep_last :]) | ({progress.best.step} if progress.best is not None else set())
        for step in steps:
            if step not in kept:
                # The name goes first: a folder that is half deleted must not look whole.
                doomed = self._folder / f".{self.path(step).name}.deleted"
                os.replace(self.path(step), doomed)
                shutil.rmtree(doomed)

    def _together(self, building: Path, action: Callable[[], None]) -> None:
        """Run `action` on the first rank; every rank learns how it went."""
        error = None
        if self._ranks.is_first:
            try:
                action()
            except OSError as failed:
                error = _reason(failed)
        self._agree(building, error)

    def _agree(self, building: Path, error: str | None, *, needed: int | None = None) -> None:
        errors = [found for found in self._ranks.gather(error) if found is not None]
        if not errors:
            return
        if self._ranks.is_first:
            shutil.rmtree(building, ignore_errors=True)
        last = self._found()
        size = "" if needed is None else f"; a checkpoint of this run needs {needed / 1e9:.3g} GB"
        safe = f"the checkpoint of step {last[-1]} is whole" if last else "there is no earlier one"
        raise CheckpointWriteError(
            f"{self._folder}: the checkpoint {building.name[1:-9]} could not be written ({errors[0]}){size}; {safe}. "
            "Make room and give the same command again"
        )


def _state(network: nn.Module, average: MovingAverage | None) -> dict[str, Tensor]:
    """Tensors that share the memory of the network and of its average: what is loaded into them is in place.

    Every micro-batch seeds PyTorch's generator; what is drawn elsewhere goes on from the stored state.
    """
    state = {f"model/{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    if average is not None:
        state |= {f"average/{name}": tensor for name, tensor in average.shadow.items()}
    return state | {_RNG: torch.get_rng_state()}


def _optimised(network: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    return [name for name, parameter in network.named_parameters() if optimiser.state.get(parameter)]


def _moments(network: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    return {
        f"optimiser/{name}/{key}": optimiser.state[parameters[name]][key]
        for name in _optimised(network, optimiser)
        for key in (_STEP, *_MOMENTS)
    }


def _make_moments(network: nn.Module, optimiser: torch.optim.Optimizer, names: list[str]) -> None:
    """Give the optimiser empty moments of the named parameters, as its first step would."""
    parameters = dict(network.named_parameters())
    fused = any(group["fused"] for group in optimiser.param_groups)
    optimiser.state.clear()
    for name in names:
        parameter = parameters[name]
        place = parameter.device if fused else torch.device("cpu")
        optimiser.state[parameter] = {_STEP: torch.zeros((), dtype=torch.float32, device=place)}
        optimiser.state[parameter] |= {key: torch.zeros_like(parameter) for key in _MOMENTS}


def _bytes(state: dict[str, Tensor]) -> int:
    """Of all tensors, on all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@contextmanager
def _without_rank_warning() -> Iterator[None]:
    """One process is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _reason(error: BaseException) -> str:
    """The innermost message, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
