"""What the pool and a simulator process say to each other: one msgpack message each way, about one environment.

Arrays travel as their bytes (C order, native byte order: both ends are one machine); frames lie in `FrameMemory`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
import numpy as np

from worldvln_edge.poses import BodyOrder
from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.environment import HORIZON, EnvironmentResult, FrameChoice
from worldvln_edge.training.environments.frame_memory import FrameMemory

SPARE_VIEWS = 8
"""Scenes that a process keeps though nobody flies in them: 20 MB each."""


class Create(msgspec.Struct, frozen=True, tag=True):
    id: str
    task: Task
    image_hw: tuple[int, int]
    max_frames: int
    order: BodyOrder


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    task: Task
    image_hw: tuple[int, int]


class Reset(msgspec.Struct, frozen=True, tag=True):
    id: str


class Step(msgspec.Struct, frozen=True, tag=True):
    id: str
    actions: bytes  # float64 [n, 6]
    frames: FrameChoice


class Close(msgspec.Struct, frozen=True, tag=True):
    id: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process renders, or did what has no other answer."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The environment's state is as it was, except after `simulator_failed`: then it is gone."""

    code: Literal["bad_task", "not_reset", "simulator_failed"]
    message: str


class Look(msgspec.Struct, frozen=True, tag=True):
    frames: tuple[int, int, int, int]  # shape of what lies in the memory, uint8 [n, H, W, 3]
    poses: bytes  # float64 [m, 6]
    collided: bytes  # bool [m]
    frame_index: int
    done: bool

    def result(self, memory: FrameMemory) -> EnvironmentResult:
        """Copied out of the memory, which the next answer overwrites."""
        return EnvironmentResult(
            frames=memory.read(self.frames),
            poses=np.frombuffer(self.poses, np.float64).reshape(-1, 6).copy(),
            collided=np.frombuffer(self.collided, np.bool_).copy(),
            frame_index=self.frame_index,
            done=self.done,
            end_reason=HORIZON if self.done else None,
        )


SimulatorRequest: TypeAlias = Create | WarmUp | Reset | Step | Close
SimulatorReply: TypeAlias = Ready | Refused | Look

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(SimulatorRequest).decode
decode_reply = msgspec.msgpack.Decoder(SimulatorReply).decode
