"""The body of POST /v1/predict_delta_actions: JSON to typed fields, as lax as the research service's.

Only known fields are read, and each only after its kind was looked at, so a body costs no more memory than its own
size. All problems are collected, 16 at most, and never echo what was sent.
Source: spec/session_protocol.md 2.1, 2.3, 7.8.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from worldvln_edge.protocol import Limits, ProtocolError
from worldvln_edge.wire import depth_within

T = TypeVar("T")
_MAX_PROBLEMS = 16
_MAX_COMMAS = 65_536  # of images_base64: millions of empty texts would cost far more memory than the body
_TRUE = frozenset({"true", "yes", "on", "t", "y", "1"})
_FALSE = frozenset({"false", "no", "off", "f", "n", "0"})
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}(\.0{1,40})?")
_ELEMENT = re.compile(r"`\$\[(\d+)\]")
_LATENT_HEAD = frozenset({"", "default", "tsformer_latent"})
# The published clients always ask for the RGB head; a server without one flies the latent head (2.9).
_RGB_HEAD = frozenset({"actionhead_ref_vit", "actionhead_ref", "actionhead_vit", "ref_vit", "actionhead"})
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class FieldProblem(msgspec.Struct, kw_only=True):
    """One entry of a 422 answer."""

    type: str
    loc: list[str | int]
    msg: str


class InvalidRequestError(ProtocolError):
    """The body is not JSON, or fields are missing, of a wrong type or out of range."""

    def __init__(self, problems: list[FieldProblem]):
        super().__init__("invalid_field", "; ".join(problem.msg for problem in problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class PredictRequest:
    """What the door acts on. Sizes and contents of texts and images are not checked yet."""

    session_id: str
    """Stripped."""
    images_base64: list[str]
    prompt: str | None
    """`instruction` if it says something, else `prompt`, stripped."""
    negative_prompt: str | None
    reset_session: bool
    prefix_mode: bool
    allow_future_segments: bool
    allow_future_last_segment: bool
    seed: int | None
    first_frame: int | None
    debug: bool


class _Body(msgspec.Struct):
    session_id: msgspec.Raw = msgspec.Raw()
    images_base64: msgspec.Raw = msgspec.Raw()
    instruction: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    negative_prompt: msgspec.Raw = msgspec.Raw()
    reset_session: msgspec.Raw = msgspec.Raw()
    prefix_mode: msgspec.Raw = msgspec.Raw()
    allow_future_segments: msgspec.Raw = msgspec.Raw()
    allow_future_last_segment: msgspec.Raw = msgspec.Raw()
    action_head_mode: msgspec.Raw = msgspec.Raw()
    action_head_batch_size: msgspec.Raw = msgspec.Raw()
    action_head_stride: msgspec.Raw = msgspec.Raw()
    action_head_pre_resize_hw: msgspec.Raw = msgspec.Raw()
    seed: msgspec.Raw = msgspec.Raw()
    first_frame: msgspec.Raw = msgspec.Raw()
    debug: msgspec.Raw = msgspec.Raw()


_DECODER = msgspec.json.Decoder(_Body)
_TEXTS = msgspec.json.Decoder(list[str])


class _FieldError(ValueError):
    def __init__(self, kind: str, msg: str, *at: int):
        super().__init__(msg)
        self.kind, self.at = kind, at


def parse_predict_request(data: bytes, limits: Limits) -> PredictRequest:
    """Read a body.

    Args:
        data: UTF-8 JSON, at most `limits.max_msg_bytes`.
        limits: gives the nesting depth.

    Raises:
        InvalidRequestError: see there.
    """
    try:
        if not depth_within(data, limits.max_json_depth):
            raise InvalidRequestError([FieldProblem(type="json_invalid", loc=["body"], msg="JSON decode error")])
        body = _DECODER.decode(data)
    except msgspec.ValidationError:
        msg = "Input should be a valid dictionary or instance of Req"
        raise InvalidRequestError([FieldProblem(type="model_type", loc=["body"], msg=msg)]) from None
    except _MALFORMED:
        raise InvalidRequestError([FieldProblem(type="json_invalid", loc=["body"], msg="JSON decode error")]) from None
    return _Reader(body).request()


class _Reader:
    def __init__(self, body: _Body):
        self._body, self._problems = body, list[FieldProblem]()

    def request(self) -> PredictRequest:
        session_id = self._read("session_id", _text, "", is_required=True)
        images = self._read("images_base64", _texts, [], is_required=True)
        instruction, prompt, negative_prompt = (
            self._read(name, _text, None, may_be_null=True) for name in ("instruction", "prompt", "negative_prompt")
        )
        flags = {
            name: self._read(name, _flag, False)
            for name in ("reset_session", "prefix_mode", "allow_future_segments", "allow_future_last_segment", "debug")
        }
        # Hints for a head of the research service; checked, so that a typing error shows.
        self._read("action_head_mode", _head_mode, None)
        self._read("action_head_batch_size", _integer_within(1, 64), 8)
        self._read("action_head_stride", _integer_within(1, 3), 1)
        self._read("action_head_pre_resize_hw", _integer_within(0, 1024), 0)
        seed = self._read("seed", _integer_within(-(2**63), 2**63 - 1), None, may_be_null=True)
        first_frame = self._read("first_frame", _integer_within(1, 2**31), None, may_be_null=True)
        if self._problems:
            raise InvalidRequestError(self._problems[:_MAX_PROBLEMS])
        return PredictRequest(
            session_id=session_id.strip(),
            images_base64=images,
            prompt=(instruction or "").strip() or (prompt or "").strip() or None,
            negative_prompt=negative_prompt,
            seed=seed,
            first_frame=first_frame,
            **flags,
        )

    def _read(
        self,
        name: str,
        convert: Callable[[bytes], Any],
        default: Any,
        *,
        is_required: bool = False,
        may_be_null: bool = False,
    ) -> Any:
        raw = bytes(getattr(self._body, name)).strip()
        loc: list[str | int] = ["body", name]
        if not raw:
            if is_required:
                self._problems.append(FieldProblem(type="missing", loc=loc, msg="Field required"))
            return default
        if may_be_null and raw == b"null":
            return default
        try:
            return convert(raw)
        except _FieldError as error:
            self._problems.append(FieldProblem(type=error.kind, loc=[*loc, *error.at], msg=str(error)))
        except (msgspec.MsgspecError, UnicodeDecodeError):  # a number out of range, or text that is not UTF-8
            self._problems.append(FieldProblem(type="json_invalid", loc=loc, msg="Input cannot be read"))
        return default


def _scalar(raw: bytes) -> Any:
    """A text, number, boolean or null; containers stay unread and come back as None."""
    return None if raw[:1] in b"[{" else msgspec.json.decode(raw)


def _text(raw: bytes) -> str:
    value = _scalar(raw)
    if not isinstance(value, str):
        raise _FieldError("string_type", "Input should be a valid string")
    return value


def _texts(raw: bytes) -> list[str]:
    if raw.count(b",") > _MAX_COMMAS:
        raise _FieldError("too_long", "List has too many elements")
    try:
        return _TEXTS.decode(raw)
    except msgspec.ValidationError as error:
        element = _ELEMENT.search(str(error))
        if element is None:
            raise _FieldError("list_type", "Input should be a valid list") from None
        raise _FieldError("string_type", "Input should be a valid string", int(element[1])) from None


def _flag(raw: bytes) -> bool:
    value = _scalar(raw)
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise _FieldError("bool_parsing", "Input should be a valid boolean, unable to interpret input")


def _integer(raw: bytes) -> int:
    value = _scalar(raw)
    if isinstance(value, str):
        if not _INTEGER.fullmatch(value.strip()):
            raise _FieldError("int_parsing", "Input should be a valid integer, unable to parse string as an integer")
        return int(value.strip().partition(".")[0])
    if isinstance(value, float) and not value.is_integer():
        raise _FieldError("int_from_float", "Input should be a valid integer, got a number with a fractional part")
    if not isinstance(value, int | float):
        raise _FieldError("int_type", "Input should be a valid integer")
    return int(value)


def _integer_within(least: int, most: int) -> Callable[[bytes], int]:
    def convert(raw: bytes) -> int:
        value = _integer(raw)
        if not least <= value <= most:
            raise _FieldError("out_of_range", f"Input should be {least} to {most}")
        return value

    return convert


def _head_mode(raw: bytes) -> None:
    if _text(raw).strip().lower() not in _LATENT_HEAD | _RGB_HEAD:
        raise _FieldError("unknown_head", "Input should be tsformer_latent or actionhead_ref_vit")
