"""How `/v1/env` writes an environment's answer, and how a client reads it.

Frames are PNG data URLs in JSON, raw pixels in msgpack; both are exact.
Source: spec/seed_systems.md 3.4.
"""

from __future__ import annotations

import base64
import io
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from PIL import Image

from worldvln_edge.training.environments.environment import (
    EnvironmentAnswer,
    EnvironmentFault,
    EnvironmentResult,
    FaultCode,
)

Encoding: TypeAlias = Literal["json", "msgpack"]
ACTION_KIND = "body_delta"
"""[dx, dy, dz, droll, dyaw, dpitch] in the body's axes, cm and deg (`worldvln_edge.poses`)."""


def read_answer(body: dict[str, Any]) -> EnvironmentAnswer:
    """A result or an error of an answer in msgpack. Raises ValueError when it is neither."""
    if "error" in body:
        return read_fault(body)
    result = msgspec.convert(body, _Result)
    return EnvironmentResult(
        frames=np.frombuffer(result.frames.data, np.uint8).reshape(result.frames.shape).copy(),
        poses=np.array(result.poses, np.float64).reshape(-1, 6),
        collided=np.array(result.collided, bool),
        frame_index=result.frame_index,
        done=result.done,
        end_reason=result.end_reason,
    )


def read_fault(body: dict[str, Any]) -> EnvironmentFault:
    """An error of an answer. Raises ValueError when it is none."""
    fault = msgspec.convert(body, _Fault).error
    return EnvironmentFault(code=fault.code, message=fault.message)


class _Error(msgspec.Struct):
    code: FaultCode
    message: str


class _Fault(msgspec.Struct):
    error: _Error


class _Frames(msgspec.Struct):
    shape: tuple[int, int, int, int]
    data: bytes


class _Result(msgspec.Struct):
    frames: _Frames
    poses: list[list[float]]
    collided: list[bool]
    frame_index: int
    done: bool
    end_reason: str | None


def answer_body(answer: EnvironmentAnswer, encoding: Encoding) -> dict[str, object]:
    """The answer, ready to be encoded."""
    if isinstance(answer, EnvironmentFault):
        return fault_body(answer)
    return {
        "frames": _pixels(answer.frames) if encoding == "msgpack" else [_png_url(frame) for frame in answer.frames],
        "poses": answer.poses.tolist(),
        "collided": answer.collided.tolist(),
        "frame_index": answer.frame_index,
        "done": answer.done,
        "end_reason": answer.end_reason,
    }


def fault_body(fault: EnvironmentFault) -> dict[str, object]:
    """The fault, ready to be encoded."""
    return {"error": {"code": fault.code, "message": fault.message}}


def _pixels(frames_NHW3: np.ndarray) -> dict[str, object]:
    return {"shape": frames_NHW3.shape, "data": np.ascontiguousarray(frames_NHW3).reshape(-1).data}


def _png_url(frame_HW3: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame_HW3).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
