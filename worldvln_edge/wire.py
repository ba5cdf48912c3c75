"""The two encodings of the native protocol: msgpack in binary frames, JSON in text frames.

Decoding a request also holds it to the limits, so what comes out is safe to act on, except for the images: they are
checked where they are decoded, because frames that the session already has are ignored unread.
Source: spec/session_protocol.md 7 (Encoding), 7.7, 7.8.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec

from worldvln_edge.protocol import (
    Answer,
    Cancel,
    Encoding,
    End,
    Hello,
    Limits,
    Observe,
    Ping,
    ProtocolError,
    Request,
    RequestId,
    Start,
)


class _IdOnly(msgspec.Struct):
    id: RequestId | None = None


class _FramesOnly(msgspec.Struct):
    frames: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=4096)] = []


_REQUEST_DECODERS: dict[Encoding, Any] = {
    "msgpack": msgspec.msgpack.Decoder(Request),
    "json": msgspec.json.Decoder(Request),
}
_ID_DECODERS: dict[Encoding, Any] = {"msgpack": msgspec.msgpack.Decoder(_IdOnly), "json": msgspec.json.Decoder(_IdOnly)}
_ANSWER_DECODERS: dict[Encoding, Any] = {
    "msgpack": msgspec.msgpack.Decoder(Answer),
    "json": msgspec.json.Decoder(Answer),
}
_ENCODERS: dict[Encoding, Any] = {"msgpack": msgspec.msgpack.Encoder(), "json": msgspec.json.Encoder()}
_FRAMES_DECODER = msgspec.msgpack.Decoder(_FramesOnly)
_CONTAINERS = frozenset(bytes([kind]) for kind in (*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF))
# DecodeError and UnicodeDecodeError are ValueErrors; RecursionError is how msgspec refuses absurd nesting.
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_MAX_BRACKETS = 100_000
_QUOTE, _OPENING, _CLOSING = ord('"'), frozenset(b"[{"), frozenset(b"]}")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'"[]{}')


def encode(message: Request | Answer, encoding: Encoding) -> bytes:
    """One message as msgpack or as UTF-8 JSON (bytes become base64 strings there)."""
    return _ENCODERS[encoding].encode(message)


def decode_request(data: bytes, encoding: Encoding, limits: Limits) -> Request:
    """Parse and check one request.

    Args:
        data: msgpack, or UTF-8 JSON.
        encoding: which of the two.
        limits: sizes to hold the request to.

    Raises:
        ProtocolError: `bad_request` (malformed, missing or contradictory), `invalid_field` (type or range) or
            `too_large`; its `re` is the request's id where that is readable.
    """
    if len(data) > limits.max_msg_bytes:
        raise ProtocolError("too_large", f"message of {len(data)} bytes; at most {limits.max_msg_bytes} are accepted")
    if encoding == "json" and not depth_within(data, limits.max_json_depth):
        raise ProtocolError(
            "bad_request",
            f"JSON is nested deeper than {limits.max_json_depth} levels, or has over {_MAX_BRACKETS} lists and objects",
        )
    if encoding == "msgpack":
        _refuse_nested_frames(data)
    try:
        request = _REQUEST_DECODERS[encoding].decode(data)
    except _MALFORMED as error:
        raise _refusal(error, data, encoding) from None
    try:
        _check(request, limits)
    except ProtocolError as error:
        error.re = request.id
        raise
    return request


def decode_answer(data: bytes, encoding: Encoding) -> Answer:
    """Parse one message of the server.

    Raises:
        ProtocolError: `bad_request`: not a message of this protocol.
    """
    try:
        return _ANSWER_DECODERS[encoding].decode(data)
    except _MALFORMED as error:
        raise ProtocolError("bad_request", f"not a message of this protocol: {error}") from None


def depth_within(data: bytes, depth_limit: int) -> bool:
    """Whether brackets outside strings never nest deeper than the limit. Malformed JSON is the parser's business.

    More lists and objects than any message of ours needs are refused as well: looking at them would take seconds.
    """
    brackets = data.count(b"[") + data.count(b"{")
    if brackets <= depth_limit or brackets > _MAX_BRACKETS:
        return brackets <= depth_limit
    # Long strings go at C speed: first what could hide a quote, then all but quotes and brackets, then the pairs of
    # quotes with nothing in between. Such a pair is a whole string, or joins two; brackets stay inside or outside.
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth, is_text = 0, False
    for byte in data.translate(None, _NOT_STRUCTURE).replace(b'""', b""):
        if byte == _QUOTE:
            is_text = not is_text
        elif not is_text and byte in _OPENING:
            depth += 1
            if depth > depth_limit:
                return False
        elif not is_text and byte in _CLOSING:
            depth -= 1
    return True


def _refuse_nested_frames(data: bytes) -> None:
    """A frame is bytes or text. A list or map in its place may be small on the wire and take 60 times its size here."""
    try:
        frames = _FRAMES_DECODER.decode(data).frames
    except _MALFORMED:
        return  # the decoder of the whole message says what is wrong
    for index, frame in enumerate(frames):
        if bytes(memoryview(frame)[:1]) in _CONTAINERS:
            raise ProtocolError(
                "invalid_field", f"`$.frames[{index}]` must be bytes or text", re=_request_id(data, "msgpack")
            )


def _request_id(data: bytes, encoding: Encoding) -> int | None:
    """`id` of a message that is refused, where that is readable."""
    try:
        return _ID_DECODERS[encoding].decode(data).id
    except _MALFORMED:
        return None


def _refusal(error: Exception, data: bytes, encoding: Encoding) -> ProtocolError:
    request_id = _request_id(data, encoding)
    text = str(error)[:200]
    if not isinstance(error, msgspec.ValidationError):
        return ProtocolError("bad_request", f"malformed {encoding} message", re=request_id)
    if text.endswith("`$.t`"):
        names = ", ".join(str(cls.__struct_config__.tag) for cls in (Hello, Start, Observe, End, Cancel, Ping))
        return ProtocolError("bad_request", f"unknown message type; this server knows {names}", re=request_id)
    if "missing required field" in text or " at `$" not in text:
        return ProtocolError("bad_request", text, re=request_id)
    return ProtocolError("invalid_field", text, re=request_id)


def _check(request: Request, limits: Limits) -> None:
    session = getattr(request, "session", None)
    if session is not None:
        check_session_name(session, limits)
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name, None)
        if text is not None and len(text) > limits.max_prompt_chars:
            raise ProtocolError(
                "too_large", f"{name} has {len(text)} characters; at most {limits.max_prompt_chars} are accepted"
            )
    if isinstance(request, Start):
        _check_start(request)
    elif isinstance(request, Observe):
        _check_observe(request, limits)


def check_session_name(session: str, limits: Limits) -> None:
    """Raise ProtocolError `bad_request` unless the client's name of a session is 1..N characters, none a control."""
    if not session.strip():
        raise ProtocolError("bad_request", "session is blank; give it a name or leave it out of start")
    if len(session) > limits.max_session_chars:
        raise ProtocolError(
            "bad_request", f"session has {len(session)} characters; at most {limits.max_session_chars} are accepted"
        )
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in session):
        raise ProtocolError("bad_request", "session holds a control character")


def _check_start(request: Start) -> None:
    if request.resume and request.session is None:
        raise ProtocolError("bad_request", "resume needs the session's name")
    if not request.resume and not (request.prompt or "").strip():
        raise ProtocolError("bad_request", "start needs a prompt (or resume: true with a known session)")


def _check_observe(request: Observe, limits: Limits) -> None:
    count = len(request.frames)
    if count > limits.max_images:
        raise ProtocolError("too_large", f"{count} frames in one message; at most {limits.max_images} are accepted")
    if request.fmt == "rgb8" and count and (request.w is None or request.h is None):
        raise ProtocolError("bad_request", "fmt rgb8 needs w and h")
    if request.deadline_ms is not None and not math.isfinite(request.deadline_ms):
        raise ProtocolError("invalid_field", "deadline_ms must be finite")
    if request.prompt is not None and not request.prompt.strip():
        raise ProtocolError("bad_request", "prompt is blank; leave it out to keep the session's prompt")
    for name in ("t_ns", "poses"):
        values = getattr(request, name)
        if values is not None and len(values) != count:
            raise ProtocolError("bad_request", f"{name} has {len(values)} entries for {count} frames")
    if request.poses is not None and not all(math.isfinite(value) for pose in request.poses for value in pose):
        raise ProtocolError("invalid_field", "poses must be finite")
