"""What a recording says: messages of our own, one type a topic, as JSON with embedded schemas; and the pictures.

| topic | message | schema in the file |
|---|---|---|
| /session | Opening | worldvln.Opening |
| /instruction | Instruction | worldvln.Instruction |
| /camera, /camera/raw | Picture | foxglove.CompressedImage, foxglove.RawImage |
| /predicted | Prediction | foxglove.CompressedImage |
| /frames | FrameNote | worldvln.FrameNote |
| /steps | Step | worldvln.Step |
| /actions | Segment | worldvln.Segment |
| /timings | Answer | worldvln.Answer |
| /refusals | Refusal | worldvln.Refusal |
| /gaps | Gap | worldvln.Gap |
| /end | Closing | worldvln.Closing |

Poses are told a second time for viewers (`foxglove_messages.py`). The file's own numbers are exact: actions as the
policy gave them are float32 bytes, and pictures are the bytes that the client sent.

Legend: H W rows and columns, N steps of a segment. Lengths cm, angles deg, as in poses.py.
Source: spec/session_protocol.md 2.4, 7.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.sessions.policy import ActionChunk, Emit

RECORDING_VERSION = 1


class FlightSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy was loaded with, as far as actions depend on it."""

    profile: str = "exact"
    """Generation profile that sessions start with."""
    own_profiles: str = "[]"
    """JSON: the profiles besides the built-in ones, with the fields of `GenerationProfile`."""
    guidance: float = 1.0
    """Weight of the guidance; 1: none."""
    speculation_threshold: float | None = None
    """None: no segment is generated ahead of its frames."""
    threads: int = 0
    """CPU threads of an engine call; 0: all cores."""


class PolicyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`policy.PolicyInfo`, as it stands in a file."""

    name: str
    precision: str
    backend: str
    device: str
    image_hw: tuple[int, int]
    weights: str
    """Digest of the bundle's graphs and weights: other weights, other actions."""


class Opening(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the session began; stands at the beginning of every part."""

    version: int = RECORDING_VERSION
    uid: str
    """Of the session; the same in all its parts."""
    part: int
    """0, 1, ...: a file that is full is followed by the next one."""
    software: str
    policy: PolicyFacts
    settings: FlightSettings
    horizon: HorizonConfig
    """Of the whole trajectory."""
    prompt: str
    negative_prompt: str = ""
    seed: int
    emit: Emit
    horizons: int | None = None
    """A chained session: of how many horizons of the model."""
    restored_frames: int = 0
    """The session was taken up from a journal with so many frames; they follow, at the model's size."""
    restored_emitted: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.restored_frames <= self.horizon.num_frames:
            raise ValueError(f"restored_frames must be 0..{self.horizon.num_frames}, found {self.restored_frames}")


class Instruction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What holds from the next segment on."""

    prompt: str
    negative_prompt: str = ""
    seed: int
    is_held: bool = False
    """An operator holds the drone: what the policy gives is answered as a standstill."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One frame as its client sent it."""

    index: int
    """1-based, of the trajectory."""
    data: bytes
    """An encoded image, or raw RGB."""
    raw_hw: tuple[int, int] | None = None
    """Size of raw RGB; None: an encoded image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the policy expected to see; for viewers, so a reader leaves it out."""

    segment: int
    frames: np.ndarray  # uint8 RGB [F, H, W, 3]
    first: int
    """Index of the first of these frames."""
    fps: int


class PoseNote(msgspec.Struct, frozen=True, kw_only=True):
    """poses.POSE_ORDER by name, so that a viewer can plot it."""

    x: float
    y: float
    z: float
    roll: float
    yaw: float
    pitch: float


class FrameNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame that was stored; its picture follows."""

    index: int
    t_ns: int | None = None
    """When it was captured, by the client's clock."""
    pose: PoseNote | None = None
    """Where, as the client said."""


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the policy session did besides emitting segments: how frames were grouped changes the last bits."""

    did: Literal["took_frames", "worked_ahead"]
    frames: int = 0
    """That it has then."""
    has_more: bool = False
    """Its work ahead was broken off."""


class ActionNote(msgspec.Struct, frozen=True, kw_only=True):
    """poses.ACTION_ORDER by name."""

    dx: float
    dy: float
    dz: float
    droll: float
    dyaw: float
    dpitch: float


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A segment's actions, when they were made."""

    segment: int
    actions: list[ActionNote]
    """As they were answered."""
    made: bytes
    """As the policy gave them: float32, little-endian, [N, 6]. Where the safety envelope put a hold in their place,
    `actions` are zero and these are not."""
    observed_frames: int
    seed: int
    head: str
    profile: str
    why: str = ""
    """Why that profile."""
    was_ready: bool = False
    """Generated before its frames were there."""
    hold: str | None = None
    late_ms: float | None = None
    device_ms: float
    stages_ms: dict[str, float] = {}

    def made_actions(self) -> np.ndarray:
        """float32 [N, 6]. Raises ValueError where they are no such array."""
        return np.frombuffer(self.made, "<f4").reshape(-1, 6)

    def answered_actions(self) -> np.ndarray:
        """float32 [N, 6]."""
        return np.array([msgspec.structs.astuple(action) for action in self.actions], np.float32).reshape(-1, 6)


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request with an observation was answered; milliseconds on the server."""

    segment: int
    """-1: none was ready."""
    frames: int
    queue_ms: float
    decode_ms: float
    infer_ms: float
    total_ms: float
    is_late: bool = False
    hold: str | None = None


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A request with an observation was refused."""

    code: str
    message: str


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """The recorder could not keep up; what is missing happened before this message."""

    first_frame: int
    """0: no frame is missing."""
    last_frame: int
    events: int
    """Of any kind."""

    def __str__(self) -> str:
        frames = f"frames {self.first_frame} to {self.last_frame}" if self.first_frame else "no frames"
        return f"the recorder could not keep up: {self.events} events are missing, with {frames}"


class Closing(msgspec.Struct, frozen=True, kw_only=True):
    """The session left the server. A recording without it was cut, or goes on."""

    reason: str
    frames: int
    emitted: int
    is_done: bool


Note = Opening | Instruction | FrameNote | Step | Segment | Answer | Refusal | Gap | Closing
"""A message that stands in the file as JSON."""
Message = Note | Picture | Prediction

NOTE_TOPICS: dict[str, type[msgspec.Struct]] = {
    "/session": Opening,
    "/instruction": Instruction,
    "/frames": FrameNote,
    "/steps": Step,
    "/actions": Segment,
    "/timings": Answer,
    "/refusals": Refusal,
    "/gaps": Gap,
    "/end": Closing,
}
CAMERA_TOPIC, RAW_CAMERA_TOPIC, PREDICTION_TOPIC = "/camera", "/camera/raw", "/predicted"


def segment_note(chunk: ActionChunk, made: ActionChunk, *, device_s: float, late_s: float | None) -> Segment:
    """A segment as it stands in a recording; arguments as in `session_events.SegmentEmitted`."""
    return Segment(
        segment=chunk.segment,
        actions=[action_note(row) for row in chunk.actions.tolist()],
        made=np.ascontiguousarray(made.actions, "<f4").tobytes(),
        observed_frames=chunk.observed_frames,
        seed=chunk.seed,
        head=chunk.head,
        profile=chunk.profile,
        why=chunk.profile_reason,
        was_ready=chunk.was_ready,
        hold=chunk.hold,
        late_ms=None if late_s is None else late_s * 1e3,
        device_ms=device_s * 1e3,
        stages_ms=chunk.timings_ms,
    )


def action_note(row: Sequence[float]) -> ActionNote:
    dx, dy, dz, droll, dyaw, dpitch = row
    return ActionNote(dx=dx, dy=dy, dz=dz, droll=droll, dyaw=dyaw, dpitch=dpitch)


def pose_note(row: Sequence[float]) -> PoseNote:
    x, y, z, roll, yaw, pitch = row
    return PoseNote(x=x, y=y, z=z, roll=roll, yaw=yaw, pitch=pitch)


def json_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """JSON schema of a message as viewers understand it: without references, and without "or null".

    What may be null is left out of the message where it is.
    """
    schema = msgspec.json.schema(kind)
    return _plain(schema, schema["$defs"])


def _plain(schema: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return _plain(named[schema["$ref"].rpartition("/")[2]], named)
    if "anyOf" in schema:
        return _plain(next(option for option in schema["anyOf"] if option.get("type") != "null"), named)
    plain = {key: value for key, value in schema.items() if key in ("title", "type", "description", "contentEncoding")}
    if "enum" in schema:
        plain["type"] = "string"
    if "properties" in schema:
        plain["properties"] = {name: _plain(each, named) for name, each in schema["properties"].items()}
    if "prefixItems" in schema:
        plain["items"] = _plain(schema["prefixItems"][0], named)
    elif isinstance(schema.get("items"), dict):
        plain["items"] = _plain(schema["items"], named)
    if isinstance(schema.get("additionalProperties"), dict):
        plain["additionalProperties"] = _plain(schema["additionalProperties"], named)
    return plain
