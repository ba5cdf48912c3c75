"""The frames of an `observe` message as RGB arrays, within the limits, or one refusal that names the frame.

Source: spec/session_protocol.md 2.4, 7.2 (`fmt`), 7.8.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np

from worldvln_edge.images import (
    EMPTY_STRING,
    NOT_BASE64,
    ImageError,
    ImageLimits,
    decode_image,
    decode_image_string,
)
from worldvln_edge.protocol import Limits, Observe, ProtocolError


def decode_frames(request: Observe, new: slice, limits: Limits, *, room_bytes: int) -> list[np.ndarray]:
    """Decode request.frames[new]; the others are not looked at.

    Args:
        request: frames are bytes, or base64/data-URL strings.
        new: the frames that the session does not have yet.
        limits: per-image limits.
        room_bytes: decoded bytes that the server can still hold.

    Returns:
        uint8 RGB [H, W, 3] each.

    Raises:
        ProtocolError: `bad_image`, `too_large`, `invalid_field` (a frame is neither bytes nor a string), `overloaded`.
    """
    image_limits = ImageLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels, max_side=limits.max_side)
    frames: list[np.ndarray] = []
    for index, data in list(enumerate(request.frames, start=request.first))[new]:
        if not isinstance(data, bytes | str):
            raise ProtocolError(
                "invalid_field", f"frame {index}: expected bytes or a base64 string, got {type(data).__name__}"
            )
        try:
            if request.fmt == "rgb8":
                frame = _raw_rgb(data, request.h or 0, request.w or 0, image_limits)
            elif isinstance(data, str):
                frame = decode_image_string(data, image_limits)
            else:
                frame = decode_image(data, image_limits)
        except ImageError as error:
            raise ProtocolError(error.code, f"frame {index}: {error}") from None
        room_bytes -= frame.nbytes
        if room_bytes < 0:
            raise ProtocolError(
                "overloaded", "the server's store of undigested frames is full; send fewer at a time", retry_ms=1000
            )
        frames.append(frame)
    return frames


def _raw_rgb(data: bytes | str, height: int, width: int, limits: ImageLimits) -> np.ndarray:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(f"{width}x{height} pixels; limit {limits.max_pixels}, side {limits.max_side}", "too_large")
    limits.check_aspect(width, height)
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise ImageError(NOT_BASE64) from None
    if not data:
        raise ImageError(EMPTY_STRING)
    if len(data) != height * width * 3:
        raise ImageError(f"rgb8 of {width}x{height} has {height * width * 3} bytes, found {len(data)}")
    return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)
