"""The contract of a batch of simulator environments: what a rollout creates, resets, steps and closes.

One environment flies one task. Two things keep the contract: `pool.LocalEnvironments` (simulator processes of this
machine) and `client.RemoteEnvironments` (the same behind HTTP). What goes wrong with a single environment is an
`EnvironmentFault` in the answer, so the others go on; a call that is wrong as a whole raises.

Legend: n frames of an answer, H W pixels, 3 RGB. Poses and actions: cm and deg (`worldvln_edge.poses`).
Source: spec/seed_systems.md 3.4; spec/session_protocol.md 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec
import numpy as np

from worldvln_edge.tasks import Task

MAX_FRAMES = 49
"""Frames of a flight, the first one included; then the horizon is reached."""
HORIZON = "horizon"
"""`end_reason` of a flight whose horizon is reached; every other end is the client's to decide."""

FaultCode: TypeAlias = Literal["bad_task", "bad_action", "not_reset", "unknown_environment", "lost", "simulator_failed"]
FrameChoice: TypeAlias = Literal["each", "last"]


class CapacityError(RuntimeError):
    """More environments were asked for than fit; none of the call was created."""

    def __init__(self, asked: int, in_use: int, capacity: int):
        super().__init__(
            f"{asked} environments were asked for and {capacity - in_use} of {capacity} are free; nothing was created. "
            "Create fewer at once, close some, or serve more (--processes, --per-process)"
        )
        self.asked, self.in_use, self.capacity = asked, in_use, capacity


class FrameSizeError(ValueError):
    """Frames of this size cannot be rendered here; nothing was created."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentFault:
    """One environment failed: its episode is lost or its request was wrong, and the run goes on.

    Codes: `bad_task` (it cannot be flown here), `bad_action` (refused; the drone has not moved), `not_reset` (step
    before reset), `unknown_environment` (never created, closed, or given back after its lease ran out), `lost` (its
    simulator process died or hung; create it again), `simulator_failed` (the renderer raised; create it again).
    """

    code: FaultCode
    message: str


@dataclass(frozen=True, kw_only=True)
class EnvironmentResult:
    """What one environment shows after a reset or a step."""

    frames: np.ndarray  # uint8 RGB [n, H, W, 3]; n = 1 after reset, else one per action (one in all: frames="last")
    poses: np.ndarray  # float64 [n, 6], achieved world poses
    collided: np.ndarray  # bool [n], of each of these steps; the drone flies on, the caller decides
    frame_index: int  # 1-based index of the last frame; 1 after reset
    done: bool  # frame_index >= max_frames; stepping on still works
    end_reason: str | None  # HORIZON once done


EnvironmentAnswer: TypeAlias = "EnvironmentResult | EnvironmentFault"


class Environments(Protocol):
    """A batch of environments. Ids are chosen by the caller. Calls may come from several threads."""

    @property
    def capacity(self) -> int:
        """How many environments may exist at once."""
        ...

    def create(
        self, tasks: Mapping[str, Task], *, image_hw: tuple[int, int], max_frames: int = MAX_FRAMES
    ) -> Mapping[str, EnvironmentFault]:
        """Make environments, all or none as far as room goes; an id that exists is replaced once the new one stands.

        Args:
            tasks: what each flies; a task names its scene.
            image_hw: rows and columns of the frames.
            max_frames: when a flight is `done`.

        Returns:
            Only those that failed; they do not exist (one that was to be replaced goes on).

        Raises:
            CapacityError: more than fit.
            FrameSizeError: frames of this size cannot be rendered.
        """
        ...

    def reset(self, ids: Sequence[str]) -> Mapping[str, EnvironmentAnswer]:
        """Put the drones at their tasks' starts and look: one frame each."""
        ...

    def step(
        self, actions: Mapping[str, np.ndarray], *, frames: FrameChoice = "each"
    ) -> Mapping[str, EnvironmentAnswer]:
        """Fly: id -> [n, 6] actions in cm and deg, n >= 1. They are checked before the first one moves the drone.

        Args:
            frames: `each` looks after every action, `last` only after the last one; poses come of every action.
        """
        ...

    def warm_up(self, tasks: Sequence[Task], *, image_hw: tuple[int, int]) -> None:
        """Load these tasks' scenes while nobody waits, so that `create` finds them ready. Returns at once."""
        ...

    def close(self, ids: Sequence[str]) -> None:
        """Give environments back; unknown ids are ignored."""
        ...


def check_actions(rows: np.ndarray) -> np.ndarray | EnvironmentFault:
    """Actions as float64 [n, 6], or why they cannot be flown."""
    try:
        array = np.asarray(rows, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or array.shape[1] != 6 or not len(array):
        shape = list(array.shape) if array.size else "nothing usable"
        return EnvironmentFault(
            code="bad_action", message=f"actions must be [n, 6] with n >= 1 (cm, deg), found {shape}"
        )
    if not np.isfinite(array).all():
        return EnvironmentFault(code="bad_action", message="actions must be finite numbers (cm, deg)")
    return np.ascontiguousarray(array)


def without_reference(task: Task) -> Task:
    """What a simulator needs of a task: the expert's path is most of its bytes, and only rewards look at it."""
    return msgspec.structs.replace(task, reference_path_raw=(), reference_path_preprocessed=())
