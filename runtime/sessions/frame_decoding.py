"""The frames of an `observe` message as RGB arrays, within the limits, or one refusal that names the frame.

Source: spec/session_protocol.md 2.4, 7.2 (`fmt`), 7.8.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import TypeVar

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

T = TypeVar("T")


def image_limits(limits: Limits) -> ImageLimits:
    """The part of the limits that concerns one image."""
    return ImageLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels, max_side=limits.max_side)


def decode_each(
    items: Iterable[T], decode_one: Callable[[T], np.ndarray], *, room_bytes: int, keep: int | None = None
) -> list[np.ndarray]:
    """Decode items one after the other, as long as there is room for the result.

    Args:
        items: encoded frames.
        decode_one: gives uint8 RGB [H, W, 3].
        room_bytes: decoded bytes that the server can still hold.
        keep: so many are kept; those after them are decoded only to learn whether they can be. None: all.

    Raises:
        ProtocolError: `overloaded`: no room; and what `decode_one` raises.
    """
    frames: list[np.ndarray] = []
    for item in items:
        frame = decode_one(item)
        if keep is not None and len(frames) >= keep:
            continue
        room_bytes -= frame.nbytes
        if room_bytes < 0:
            raise store_is_full()
        frames.append(frame)
    return frames


def store_is_full() -> ProtocolError:
    """The refusal of frames for which there is no room."""
    return ProtocolError(
        "overloaded", "the server's store of undigested frames is full; send fewer at a time", retry_ms=1000
    )


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
    size_limits = image_limits(limits)

    def decode_one(item: tuple[int, object]) -> np.ndarray:
        index, data = item
        if not isinstance(data, bytes | str):
            raise ProtocolError(
                "invalid_field", f"frame {index}: expected bytes or a base64 string, got {type(data).__name__}"
            )
        try:
            if request.fmt == "rgb8":
                return _raw_rgb(data, request.h or 0, request.w or 0, size_limits)
            return decode_image_string(data, size_limits) if isinstance(data, str) else decode_image(data, size_limits)
        except ImageError as error:
            raise ProtocolError(error.code, f"frame {index}: {error}") from None

    items = list(enumerate(request.frames, start=request.first))[new]
    return decode_each(items, decode_one, room_bytes=room_bytes)


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raise ImageError `too_large` for raw pixels of a size that an encoded image may not have either."""
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(f"{width}x{height} pixels; limit {limits.max_pixels}, side {limits.max_side}", "too_large")
    limits.check_aspect(width, height)


def _raw_rgb(data: bytes | str, height: int, width: int, limits: ImageLimits) -> np.ndarray:
    check_size(width, height, limits)
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
