"""msgpack-numpy as openpi writes it: observations in, results out.

An array is the map {b"__ndarray__": true, b"data": bin, b"dtype": str, b"shape": [...]}, a NumPy scalar
{b"__npgeneric__": true, b"data": value, b"dtype": str}. Nothing is unpickled: only booleans, integers, floats and texts
are read. Keys that are not ours stay unread, so a message costs no more memory than its own size.
Source: spec/session_protocol.md 6.1, 6.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from worldvln_edge.images import ImageError, decode_image
from worldvln_edge.protocol import Limits, ProtocolError
from worldvln_edge.runtime.sessions.frame_decoding import check_size, decode_each, image_limits
from worldvln_edge.runtime.sessions.session_events import SentFrame

Reply = Literal["segment", "step"]
REPLIES: tuple[Reply, ...] = ("segment", "step")
IMAGE_KEYS = ("images", "image", "observation/images", "observation/image")

_DTYPE = re.compile(r"[<>|=]?(?:[biuf][1248]|b1|U[0-9]{1,5})")
_MAX_DIMENSIONS = 8
_MAX_ARRAY_KEYS = 8
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _Observation(msgspec.Struct):
    images: msgspec.Raw = msgspec.Raw()
    image: msgspec.Raw = msgspec.Raw()
    observation_images: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="observation/images")
    observation_image: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="observation/image")
    prompt: msgspec.Raw = msgspec.Raw()
    session_id: msgspec.Raw = msgspec.Raw()
    reset: msgspec.Raw = msgspec.Raw()
    first_frame: msgspec.Raw = msgspec.Raw()
    seed: msgspec.Raw = msgspec.Raw()
    negative_prompt: msgspec.Raw = msgspec.Raw()
    reply: msgspec.Raw = msgspec.Raw()
    deadline_ms: msgspec.Raw = msgspec.Raw()


_OBSERVATION = msgspec.msgpack.Decoder(_Observation)
_IMAGES = msgspec.msgpack.Decoder(bytes | list[bytes] | dict[bytes, msgspec.Raw])
_ARRAY_MAP = msgspec.msgpack.Decoder(dict[bytes, msgspec.Raw])
_SHAPE = msgspec.msgpack.Decoder(list[int])


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a client sent, checked; its images are decoded later, as far as they are new."""

    images: FrameList
    prompt: str | None = None
    session_id: str | None = None
    reset: bool = False
    first_frame: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    reply: Reply = "segment"
    deadline_ms: float | None = None


class FrameList:
    """`FrameBatch` of raw arrays (uint8 [H, W, 3], views of the message) or encoded images."""

    def __init__(self, frames: list[Any], limits: Limits):
        self._frames, self._limits = frames, image_limits(limits)

    def __len__(self) -> int:
        return len(self._frames)

    def decode(self, new: slice, *, keep: int, room_bytes: int) -> list[np.ndarray]:
        return decode_each(self._frames[new][:keep], self._decode_one, room_bytes=room_bytes)

    def sent(self, new: slice) -> list[SentFrame]:
        frames = self._frames[new]
        arrays = [frame for frame in frames if isinstance(frame, np.ndarray)]
        # Whoever keeps a view keeps all that it was cut from, which may be every frame since the beginning.
        keeps_too_much = bool(arrays) and _owner_bytes(arrays[0]) > 2 * sum(frame.nbytes for frame in arrays)
        return [
            SentFrame(data)
            if isinstance(data, bytes)
            else SentFrame(data.copy() if keeps_too_much else data, data.shape[:2])
            for data in frames
        ]

    def _decode_one(self, frame: np.ndarray | bytes) -> np.ndarray:
        try:
            if isinstance(frame, bytes):
                return decode_image(frame, self._limits)
            check_size(frame.shape[1], frame.shape[0], self._limits)
            return np.array(frame, order="C")  # a copy: a view would keep the whole message
        except ImageError as error:
            raise ProtocolError(error.code, str(error)) from None


def _owner_bytes(array: np.ndarray) -> int:
    """Of the array that this one is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes


def decode_observation(data: bytes, limits: Limits) -> Observation:
    """Read one frame of a client.

    Raises:
        ProtocolError: `bad_request` (not a msgpack map, blank prompt), `invalid_field` (type or range), `bad_image`
            (images are neither uint8 RGB arrays nor bytes), `too_large`.
    """
    try:
        raw = _OBSERVATION.decode(data)
    except _MALFORMED:
        raise ProtocolError("bad_request", "an observation must be a msgpack map with text keys") from None
    prompt, negative_prompt = _prompt(raw, "prompt", limits), _prompt(raw, "negative_prompt", limits)
    if prompt is not None and not prompt.strip():
        raise ProtocolError("bad_request", "prompt is blank; leave it out to keep the session's prompt")
    reply = _value(raw, "reply", str, "text") or "segment"
    if reply not in REPLIES:
        raise ProtocolError("invalid_field", f"reply must be one of {', '.join(REPLIES)}")
    deadline_ms = _value(raw, "deadline_ms", (int, float), "a number")
    if deadline_ms is not None and not math.isfinite(deadline_ms):
        raise ProtocolError("invalid_field", "deadline_ms must be finite")
    return Observation(
        images=FrameList(_frames(raw, limits), limits),
        prompt=None if prompt is None else prompt.strip(),
        session_id=_value(raw, "session_id", str, "text"),
        reset=bool(_value(raw, "reset", bool, "a boolean")),
        first_frame=_integer(raw, "first_frame", 1, 2**31),
        seed=_integer(raw, "seed", -(2**63), 2**63 - 1),
        negative_prompt=negative_prompt,
        reply=reply,
        deadline_ms=deadline_ms,
    )


def encode_map(message: Mapping[str, object]) -> bytes:
    """A result or the metadata as one frame; NumPy arrays may stand at any depth."""
    return msgspec.msgpack.encode(message, enc_hook=_array_map)


def _array_map(value: object) -> dict[bytes, object]:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"cannot send {type(value).__name__} to an openpi client")
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": list(value.shape),
    }


def _frames(observation: _Observation, limits: Limits) -> list[Any]:
    """The images of the first key that has any: encoded bytes, or uint8 arrays [H, W, 3]."""
    for name in IMAGE_KEYS:
        raw = bytes(getattr(observation, name.replace("/", "_")))
        if raw and raw != b"\xc0":
            return _decode_frames(raw, limits)
    return []


def _decode_frames(raw: bytes, limits: Limits) -> list[Any]:
    count = _count(raw)
    if count > limits.max_images:
        raise ProtocolError("too_large", f"more than {limits.max_images} images")
    try:
        value = _IMAGES.decode(raw)
    except _MALFORMED:
        raise _bad_image("another type") from None
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, list):
        return list(value)
    array = _array(value)
    if array is None:
        raise _bad_image("a map that is no array of numbers")
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise _bad_image(_describe(array))
    if array.shape[-1] != 3 and array.shape[-3] == 3:
        array = np.moveaxis(array, -3, -1)
    if array.shape[-1] != 3 or 0 in array.shape[-3:-1]:
        raise _bad_image(_describe(array))
    frames = array[None] if array.ndim == 3 else array
    if len(frames) > limits.max_images:
        raise ProtocolError("too_large", f"more than {limits.max_images} images")
    return list(frames)


def _bad_image(found: str) -> ProtocolError:
    return ProtocolError("bad_image", f"image must be uint8 (H,W,3) or (k,H,W,3), got {found}")


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype.name} ({','.join(str(length) for length in array.shape)})"


def _array(fields: Mapping[bytes, msgspec.Raw]) -> np.ndarray | None:
    """The array behind its map, as a view; None if the map is none, or not of plain numbers or texts."""
    if not {b"__ndarray__", b"data", b"dtype", b"shape"} <= fields.keys():
        return None
    try:
        name = msgspec.msgpack.decode(fields[b"dtype"], type=str)
        shape_raw = bytes(fields[b"shape"])
        shape = _SHAPE.decode(shape_raw) if _count(shape_raw) <= _MAX_DIMENSIONS else None
        data = msgspec.msgpack.decode(fields[b"data"], type=bytes)
    except _MALFORMED:
        return None
    if shape is None or not _DTYPE.fullmatch(name) or any(length < 0 for length in shape):
        return None
    try:
        dtype = np.dtype(name)
    except TypeError:  # f1, for example
        return None
    if dtype.itemsize == 0 or len(data) != math.prod(shape) * dtype.itemsize:
        return None
    return np.frombuffer(data, dtype).reshape(shape)


def _prompt(observation: _Observation, name: str, limits: Limits) -> str | None:
    text = _value(observation, name, str, "text")
    if text is not None and len(text) > limits.max_prompt_chars:
        raise ProtocolError("too_large", f"{name} is longer than {limits.max_prompt_chars} characters")
    return text


def _integer(observation: _Observation, name: str, least: int, most: int) -> int | None:
    value = _value(observation, name, int, "an integer")
    if value is not None and not least <= value <= most:
        raise ProtocolError("invalid_field", f"{name} must be {least} to {most}")
    return value


def _value(observation: _Observation, name: str, kinds: type | tuple[type, ...], expected: str) -> Any:
    """A plain value, a NumPy scalar or an array without dimensions; None if the key is absent or nil."""
    raw = bytes(getattr(observation, name))
    if not raw:
        return None
    value: Any = None
    try:
        if _count(raw) < 0:
            value = msgspec.msgpack.decode(raw)
            if value is None:
                return None
        elif _count(raw) <= _MAX_ARRAY_KEYS:
            fields = _ARRAY_MAP.decode(raw)
            if b"__npgeneric__" in fields and b"data" in fields and _count(bytes(fields[b"data"])) < 0:
                value = msgspec.msgpack.decode(fields[b"data"])
            elif (array := _array(fields)) is not None and array.ndim == 0:
                value = array.item()
    except (*_MALFORMED, ValueError):
        pass  # refused below, as what it is not
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ProtocolError("invalid_field", f"{name} must be {expected}")
    return value


def _count(raw: bytes) -> int:
    """Length of a msgpack array, entries of a map; -1 for anything else."""
    kind = raw[0] if raw else 0xC0
    if 0x80 <= kind <= 0x9F:
        return kind & 0x0F
    width = {0xDC: 2, 0xDE: 2, 0xDD: 4, 0xDF: 4}.get(kind)
    return -1 if width is None else int.from_bytes(raw[1 : 1 + width], "big")
