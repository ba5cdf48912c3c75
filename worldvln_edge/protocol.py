"""Native session protocol, version 1: the messages, the error table and the limits. `wire.py` encodes and decodes them.

One schema serves servers and clients. A message is a map with a type `t`; msgpack carries images as bin, JSON carries
them as base64 or data-URL strings. Unknown keys are ignored, an unknown `t` is `bad_request`.
Source: spec/session_protocol.md 7.1, 7.2, 7.7, 7.8, 7.9.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

PROTOCOL_VERSION = 1
WEBSOCKET_PATH = "/v1/session"
WEBSOCKET_SUBPROTOCOL = "worldvln.v1"
ZMQ_PORT = 8003

Encoding = Literal["msgpack", "json"]
SessionPhase = Literal["open", "done", "ended"]

RequestId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
# Far above every limit; longer lists are refused before they take memory.
_MAX_LIST = 4096
_Listed = Meta(max_length=_MAX_LIST)
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class ErrorSpec(NamedTuple):
    http: int | None
    """Status of the HTTP doors; None where the error exists on message transports only."""
    retry: bool
    """Whether sending again (after what the message says) can succeed."""


ERRORS: dict[str, ErrorSpec] = {
    "bad_request": ErrorSpec(400, False),
    "invalid_field": ErrorSpec(422, False),
    "bad_image": ErrorSpec(400, False),
    "prefix_shrunk": ErrorSpec(400, False),
    "gap": ErrorSpec(409, True),
    "unknown_session": ErrorSpec(400, False),
    "unauthorized": ErrorSpec(401, False),
    "forbidden": ErrorSpec(403, False),
    "hello_required": ErrorSpec(None, True),
    "unsupported_version": ErrorSpec(None, False),
    "unsupported_media": ErrorSpec(415, False),
    "too_large": ErrorSpec(413, False),
    "timeout": ErrorSpec(408, True),
    "busy": ErrorSpec(429, True),
    "overloaded": ErrorSpec(503, True),
    "not_ready": ErrorSpec(503, True),
    "deadline": ErrorSpec(504, True),
    "cancelled": ErrorSpec(499, False),
    "nonfinite_actions": ErrorSpec(500, False),
    "internal": ErrorSpec(500, True),
}


class ProtocolError(ValueError):
    """A request that is refused. `code` is a key of ERRORS; the message is one line for humans.

    `re` is the request's id where it could be read; the other attributes are the extra keys of an `error` message.
    """

    def __init__(
        self,
        code: str,
        msg: str,
        *,
        re: int | None = None,
        retry_ms: int | None = None,
        expected: int | None = None,
        frames: int | None = None,
        error_id: str | None = None,
    ):
        super().__init__(msg)
        self.code, self.msg, self.re = code, msg, re
        self.retry_ms, self.expected, self.frames, self.error_id = retry_ms, expected, frames, error_id

    @property
    def retry(self) -> bool:
        return ERRORS[self.code].retry

    def to_message(self, re: int | None = None) -> Error:
        """The `error` message for this refusal; `re` is used when the error does not know its request."""
        extra = {name: getattr(self, name) for name in ("retry_ms", "expected", "frames", "error_id")}
        return Error(
            re=self.re if self.re is not None else re,
            code=self.code,
            msg=self.msg,
            retry=self.retry,
            **{name: value for name, value in extra.items() if value is not None},
        )


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a server accepts; sent in `welcome`. Source: spec/session_protocol.md 7.8."""

    max_msg_bytes: int = 64 * 2**20
    max_images: int = 128
    max_image_bytes: int = 8 * 2**20
    """Encoded bytes of one image; raw rgb8 frames are bounded by max_pixels instead."""
    max_pixels: int = 16_000_000
    max_side: int = 8192
    max_session_chars: int = 256
    max_prompt_chars: int = 4096
    max_json_depth: int = 32
    max_sessions: int = 256
    max_open_sessions_per_key: int = 64
    """Sessions that are not done yet; counts only where keys are used."""
    max_stored_bytes: int = 2**30
    """Decoded frames that wait for inference, over all sessions; a server with little memory keeps fewer."""
    session_ttl_s: float = 600
    min_idle_s: float = 60
    """A session that was active within this time is never dropped to make room."""
    max_horizons: int = 64
    """Of one chained session."""
    max_in_flight: int = 4
    max_requests_per_s: float = 0
    """Of one key, or of one address where no keys are used; 0 is no limit."""
    max_queue: int = 64
    max_connections: int = 512
    headers_within_s: float = 10
    """Headers of an HTTP request or a WebSocket upgrade."""
    body_within_s: float = 15
    """Body of an HTTP request."""
    max_unsent_bytes: int = 8 * 2**20
    """A connection whose reader lets more than this pile up is closed."""


class _Request(msgspec.Struct, tag_field="t", kw_only=True, omit_defaults=True):
    id: RequestId


class Hello(_Request, tag="hello"):
    v: Annotated[list[int], _Listed]
    client: str = ""
    key: str | None = None


class Start(_Request, tag="start"):
    session: str | None = None
    prompt: str | None = None
    seed: Int64 = 0
    negative_prompt: str = ""
    emit: Literal["ahead", "behind"] = "ahead"
    resume: bool = False
    chain: bool = False
    """Go on behind the model's horizon: its last frame is the first of the next one."""
    max_horizons: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """Of a chained session; None: as many as the server allows (`limits.max_horizons`)."""


class Observe(_Request, tag="observe"):
    session: str
    first: Annotated[int, Meta(ge=1, le=2**31)]
    frames: Annotated[list[Any], _Listed]
    """Each frame is bytes (msgpack) or a base64/data-URL string (JSON); checked where it is decoded, because frames
    that are already stored are ignored unread."""
    fmt: Literal["auto", "rgb8"] = "auto"
    w: Annotated[int, Meta(ge=1)] | None = None
    h: Annotated[int, Meta(ge=1)] | None = None
    seg: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    prompt: str | None = None
    deadline_ms: float | None = None
    t_ns: Annotated[list[Int64], _Listed] | None = None
    poses: Annotated[list[tuple[float, float, float, float, float, float]], _Listed] | None = None


class End(_Request, tag="end"):
    session: str


class Cancel(_Request, tag="cancel"):
    target: RequestId


class Ping(_Request, tag="ping"):
    t_ns: Int64 = 0


Request = Hello | Start | Observe | End | Cancel | Ping


class _Answer(msgspec.Struct, tag_field="t", kw_only=True):
    re: int | None
    """`id` of the request; None only where the id itself was unreadable."""


class ServerInfo(msgspec.Struct, kw_only=True):
    name: str
    version: str


class ModelInfo(msgspec.Struct, kw_only=True):
    name: str
    precision: str
    backend: str
    device: str


class ActionInfo(msgspec.Struct, kw_only=True):
    order: tuple[str, ...]
    units: tuple[str, ...]
    frame: str = "body"
    apply: str = "trans_first"


class ImageInfo(msgspec.Struct, kw_only=True):
    hw: tuple[int, int]
    max_bytes: int
    max_pixels: int
    formats: tuple[str, ...] = ("jpeg", "png", "webp", "rgb8")


class Welcome(_Answer, tag="welcome"):
    v: int
    server: ServerInfo
    model: ModelInfo
    num_frames: int
    step: int
    points: tuple[int, ...]
    fps: float
    action: ActionInfo
    image: ImageInfo
    limits: Limits
    ready: bool


class SessionState(_Answer, tag="session"):
    session: str
    state: SessionPhase
    frames: int
    """Frames stored, n."""
    emitted: int
    """Last emitted segment, -1 at the start."""
    need: int
    """Frames missing for the next segment; 0 when none are."""


class StageTimes(msgspec.Struct, kw_only=True):
    """Milliseconds on the server."""

    queue: float
    decode: float
    infer: float
    total: float


class Actions(_Answer, tag="actions"):
    session: str
    seg: int
    """Emitted segment, -1 if none was ready."""
    actions: list[list[float]]
    """[step, 6] float32 values in cm and deg, order poses.ACTION_ORDER; empty when seg is -1."""
    frames: int
    need: int
    done: bool
    ms: StageTimes
    head: Literal["latent", "rgb"]
    seed: int
    profile: str | UnsetType = UNSET
    """Generation profile that was flown."""
    why: str | UnsetType = UNSET
    """Why that profile, where a deadline chose it."""
    t_ns: int | UnsetType = UNSET
    """Capture time of the newest frame that the answer rests on, when the client gave one."""
    late: bool | UnsetType = UNSET
    hold: str | UnsetType = UNSET
    settled: bool | UnsetType = UNSET
    """Chained sessions: the drone has hardly moved for some steps, so it has probably arrived."""


class Pong(_Answer, tag="pong"):
    t_ns: int
    server_ns: int
    sessions: int
    queue: int
    ready: bool


class Error(_Answer, tag="error"):
    code: str
    msg: str
    retry: bool
    retry_ms: int | UnsetType = UNSET
    expected: int | UnsetType = UNSET
    frames: int | UnsetType = UNSET
    error_id: str | UnsetType = UNSET


class Bye(msgspec.Struct, tag_field="t", tag="bye", kw_only=True, omit_defaults=True):
    """The only message that answers nothing."""

    reason: Literal["shutdown", "expired"]
    session: str | None = None


Answer = Welcome | SessionState | Actions | Pong | Error | Bye
