"""The trace of one flight of one candidate: everything that rewards and the policy gradient need, in one file.

A file is written whole or not at all, holds tensors and one JSON header, and runs no code when it is read.

Legend: C latent channels, T latent frames, H W latent grid, t h w d frames, rows, columns and bits of a step.
Poses and actions: cm and deg, orders of `worldvln_edge.poses`.
Source: spec/training.md 5.2, 5.3, 5.9 items 1, 2 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldvln_edge.atomic import atomic_file
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions

TRACE_SUFFIX = ".safetensors"
_HEADER = "flight"

HORIZON = "horizon"
"""`end_reason` of a flight that was flown to its end; every other one is the name of an early-stopping rule."""


class TraceError(ValueError):
    """A trace that cannot be written or read. The message says which file, what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class SegmentTrace:
    """One generated clip and what was flown of it."""

    bits: tuple[Tensor, ...]
    """uint8 [t, h, w, d] of every step of `rollout_steps`: one a scale, or one a repetition (`repetitions = all`)."""
    log_probs: tuple[Tensor, ...]
    """float32, in the shapes of `bits`: log-probability of each bit; [0] where a step is no policy step."""
    actions: np.ndarray
    """float64 [n, 6] as flown: of the whole segment, or fewer (at least one) when the flight was stopped in it."""
    poses: np.ndarray
    """float64 [n+1, 6] world poses of the simulator; the first is where the segment began."""

    @property
    def log_prob(self) -> float:
        """Sum over all scored bits."""
        return float(sum(one.double().sum() for one in self.log_probs))


@dataclass(frozen=True, kw_only=True)
class FlightTrace:
    """One flight of one candidate of one task."""

    task_id: str
    group_id: str
    """Candidates with one group id are compared with each other."""
    candidate_id: int
    seed: int
    """Of the draws; a retry has another one than the first attempt."""
    attempt: int
    """0, or how many attempts failed before."""
    prompt: str
    """Text that was tokenised: duration tag and instruction."""
    checkpoint_digest: str
    """Of all networks that flew, see `RolloutPolicy.digest`."""
    policy_scales: PolicyScales
    repetitions: Repetitions
    latents: Tensor
    """float32 [C, T, H, W] of the frames that were observed: clips 0..g for the last generated clip g + 1."""
    segments: tuple[SegmentTrace, ...]
    """The segments that were generated: fewer than the horizon has when the flight ended before."""
    end_reason: str
    """`HORIZON`, or the name of the rule that stopped the flight (`early_stopping.py`)."""
    collided: bool
    environment_steps: int
    """Actions that were flown."""
    horizon_steps: int
    """Actions of a flight that is flown to its end."""

    @property
    def environment_steps_saved(self) -> int:
        """Actions that were not flown, because how the flight goes on was settled."""
        return self.horizon_steps - self.environment_steps

    def flown_poses(self) -> np.ndarray:
        """Achieved world poses: float64 [environment_steps + 1, 6], start included."""
        return np.concatenate([self.segments[0].poses[:1], *(segment.poses[1:] for segment in self.segments)])

    def completed_poses(self) -> np.ndarray:
        """Poses of the whole horizon: float64 [horizon_steps + 1, 6].

        A flight that ended early stands where it ended until the horizon is over; its return is computed from these.
        """
        flown = self.flown_poses()
        return np.concatenate([flown, np.repeat(flown[-1:], self.environment_steps_saved, axis=0)])


class _SegmentHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    steps: int


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    task_id: str
    group_id: str
    candidate_id: int
    seed: int
    attempt: int
    prompt: str
    checkpoint_digest: str
    policy_scales: PolicyScales
    repetitions: Repetitions
    segments: tuple[_SegmentHeader, ...]
    end_reason: str
    collided: bool
    environment_steps: int
    horizon_steps: int


_PLAIN = tuple(name for name in _Header.__struct_fields__ if name != "segments")


def write_trace(trace: FlightTrace, path: Path) -> None:
    """Write a trace, whole or not at all; an older file is replaced.

    Raises:
        TraceError: the disk is full or the folder cannot be written, or a number is not finite.
    """
    tensors = {"latents": trace.latents.detach().cpu().float().contiguous()}
    for index, segment in enumerate(trace.segments):
        tensors[f"{index}.actions"] = torch.tensor(np.array(segment.actions, np.float64))
        tensors[f"{index}.poses"] = torch.tensor(np.array(segment.poses, np.float64))
        for step, (bits, log_probs) in enumerate(zip(segment.bits, segment.log_probs, strict=True)):
            tensors[f"{index}.bits.{step}"] = bits.detach().cpu().to(torch.uint8).contiguous()
            tensors[f"{index}.log_probs.{step}"] = log_probs.detach().cpu().float().contiguous()
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TraceError(f"{path}: {name} of task {trace.task_id!r} holds NaN or infinity; nothing was written")
    header = _Header(
        segments=tuple(_SegmentHeader(steps=len(segment.bits)) for segment in trace.segments),
        **{name: getattr(trace, name) for name in _PLAIN},
    )
    try:
        with atomic_file(Path(path)) as building:
            save_file(tensors, building, metadata={_HEADER: msgspec.json.encode(header).decode()})
            building.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise TraceError(
            f"{path}: cannot be written ({error}); make room, or put the collection elsewhere; nothing was left behind"
        ) from error


def read_trace(path: Path) -> FlightTrace:
    """Read a trace onto the CPU.

    Raises:
        TraceError: no such file, a truncated or foreign one, or tensors that do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path}: no such trace; collect the flights first")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise TraceError(
            f"{path} is truncated or no trace ({error}); delete it and collect again, only this flight is flown anew"
        ) from error
    if text is None:
        raise TraceError(f"{path}: a safetensors file, but no trace of a flight; take it out of the folder")
    try:
        header = msgspec.json.decode(text, type=_Header)
        segments = tuple(_segment(tensors, index, part.steps) for index, part in enumerate(header.segments))
        latents = tensors["latents"]
    except (msgspec.MsgspecError, KeyError) as error:
        raise TraceError(
            f"{path}: the trace does not fit this version ({error}); delete it and collect again"
        ) from error
    trace = FlightTrace(latents=latents, segments=segments, **{name: getattr(header, name) for name in _PLAIN})
    _check(trace, path)
    return trace


def _segment(tensors: dict[str, Tensor], index: int, steps: int) -> SegmentTrace:
    return SegmentTrace(
        bits=tuple(tensors[f"{index}.bits.{step}"] for step in range(steps)),
        log_probs=tuple(tensors[f"{index}.log_probs.{step}"] for step in range(steps)),
        actions=tensors[f"{index}.actions"].numpy(),
        poses=tensors[f"{index}.poses"].numpy(),
    )


def _check(trace: FlightTrace, path: Path) -> None:
    flown = 0
    for index, segment in enumerate(trace.segments):
        rows = len(segment.actions)
        flown += rows
        fits = segment.actions.shape == (rows, 6) and segment.poses.shape == (rows + 1, 6)
        scored = all(
            tuple(log_probs.shape) in (tuple(bits.shape), (0,))
            for bits, log_probs in zip(segment.bits, segment.log_probs, strict=True)
        )
        if not fits or not scored:
            raise TraceError(
                f"{path}: segment {index} holds tensors that do not fit together; delete the file and collect again"
            )
    if not trace.segments or trace.latents.ndim != 4 or flown != trace.environment_steps:
        raise TraceError(f"{path}: latents, segments and steps do not fit together; delete the file and collect again")
