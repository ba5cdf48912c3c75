"""One session's events as the messages of its recording, and as what viewers draw: its path and the planned one.

The path is what the client says of its poses. Where it says nothing, it is what the answered actions add up to from
where the session began, so holds stand still in it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import msgspec
import numpy as np
from foxglove_schemas_protobuf.Pose_pb2 import Pose

from worldvln_edge import __version__
from worldvln_edge.config import HorizonConfig
from worldvln_edge.images import read_image_string
from worldvln_edge.poses import integrate_actions
from worldvln_edge.runtime.recording.foxglove_messages import (
    LOG_TOPIC,
    PATH_TOPIC,
    PLAN_TOPIC,
    POSE_TOPIC,
    log_message,
    path_message,
    transform_message,
    viewer_pose,
)
from worldvln_edge.runtime.recording.recording_messages import (
    Answer,
    Closing,
    FlightSettings,
    FrameNote,
    Gap,
    Instruction,
    Message,
    Opening,
    Picture,
    PolicyFacts,
    Prediction,
    Refusal,
    Segment,
    Step,
    pose_note,
    segment_note,
)
from worldvln_edge.runtime.sessions.policy import PolicyInfo
from worldvln_edge.runtime.sessions.session_events import (
    FramesPredicted,
    FramesStored,
    FramesTaken,
    RequestAnswered,
    RequestRefused,
    SegmentEmitted,
    SentFrame,
    SessionClosed,
    SessionEvent,
    SessionOpened,
    SessionResumed,
    SettingsReplaced,
    WorkedAhead,
)

_MOST_PATH = 500


def opening_of(event: SessionOpened, info: PolicyInfo, settings: FlightSettings) -> Opening:
    """How a session began, for its file."""
    return Opening(
        uid=event.uid,
        part=0,
        software=__version__,
        policy=PolicyFacts(
            name=info.name,
            precision=info.precision,
            backend=info.backend,
            device=info.device,
            image_hw=info.image_hw,
            weights=info.weights,
        ),
        settings=settings,
        horizon=event.horizon,
        prompt=event.prompt,
        negative_prompt=event.negative_prompt,
        seed=event.seed,
        emit=event.emit,
        horizons=event.horizons,
        restored_frames=len(event.restored_frames),
        restored_emitted=event.restored_emitted,
    )


def messages_of(event: SessionEvent, horizon: HorizonConfig) -> Iterator[Message]:
    """What an event says, in the order in which it stands in the file. Images arrive as they were sent.

    Args:
        event: of a session.
        horizon: of its whole trajectory.
    """
    if isinstance(event, SessionOpened):
        for index, frame in enumerate(event.restored_frames, start=1):
            yield FrameNote(index=index)
            yield Picture(index=index, data=frame.tobytes(), raw_hw=_hw(frame))
    elif isinstance(event, FramesStored):
        for at, sent in enumerate(event.sent):
            yield FrameNote(
                index=event.first + at,
                t_ns=None if event.t_ns is None else event.t_ns[at],
                pose=None if event.poses is None else pose_note(event.poses[at]),
            )
            yield _picture(event.first + at, sent)
    elif isinstance(event, SettingsReplaced):
        yield Instruction(
            prompt=event.prompt, negative_prompt=event.negative_prompt, seed=event.seed, is_held=event.is_held
        )
    elif isinstance(event, FramesTaken):
        yield Step(did="took_frames", frames=event.frames)
    elif isinstance(event, WorkedAhead):
        yield Step(did="worked_ahead", has_more=event.has_more)
    elif isinstance(event, SegmentEmitted):
        yield segment_note(event.chunk, event.made, device_s=event.device_s, late_s=event.late_s)
    elif isinstance(event, FramesPredicted):
        first = horizon.points[event.segment] + 1
        yield Prediction(segment=event.segment, frames=event.frames, first=first, fps=horizon.fps)
    elif isinstance(event, RequestAnswered):
        yield Answer(
            segment=event.segment,
            frames=event.frames,
            queue_ms=event.ms.queue,
            decode_ms=event.ms.decode,
            infer_ms=event.ms.infer,
            total_ms=event.ms.total,
            is_late=event.is_late,
            hold=event.hold,
        )
    elif isinstance(event, RequestRefused):
        yield Refusal(code=event.code, message=event.message)
    elif isinstance(event, SessionClosed):
        yield Closing(reason=event.reason, frames=event.frames, emitted=event.emitted, is_done=event.is_done)
    else:
        assert isinstance(event, SessionResumed)  # nothing was lost, so nothing is to be said


def _picture(index: int, sent: SentFrame) -> Picture:
    if sent.raw_hw is None:
        if isinstance(sent.data, str):
            return Picture(index=index, data=read_image_string(sent.data))
        assert isinstance(sent.data, bytes)
        return Picture(index=index, data=sent.data)
    if isinstance(sent.data, np.ndarray):
        return Picture(index=index, data=sent.data.tobytes(), raw_hw=sent.raw_hw)
    data = base64.b64decode(sent.data) if isinstance(sent.data, str) else sent.data
    return Picture(index=index, data=data, raw_hw=sent.raw_hw)


def _hw(frame: np.ndarray) -> tuple[int, int]:
    height, width = frame.shape[:2]
    return int(height), int(width)


class SessionTrack:
    """Where a session is, and what it will fly next, as messages for viewers."""

    def __init__(self) -> None:
        self._pose = np.zeros(6)
        self._path: list[Pose] = []
        self._has_poses = False

    def draw(self, note: Message, time_ns: int) -> Iterator[tuple[str, bytes]]:
        """Topic and message of what a note changes in the picture."""
        if isinstance(note, FrameNote) and note.pose is not None:
            self._has_poses = True
            self._pose = np.array(msgspec.structs.astuple(note.pose))
            self._draw_on([viewer_pose(self._pose.tolist())])
            yield POSE_TOPIC, transform_message(self._path[-1], time_ns)
        elif isinstance(note, Segment):
            planned = integrate_actions(self._pose, note.answered_actions())
            drawn = [viewer_pose(pose) for pose in [self._pose.tolist(), *planned.tolist()]]
            yield PLAN_TOPIC, path_message(drawn, time_ns)
            yield PATH_TOPIC, path_message(self._path, time_ns)
            if not self._has_poses:
                yield POSE_TOPIC, transform_message(drawn[0], time_ns)
                self._pose = planned[-1] if len(planned) else self._pose
                self._draw_on(drawn[1:])
            if note.hold is not None:
                yield LOG_TOPIC, log_message(f"segment {note.segment}: hold ({note.hold})", time_ns, is_error=False)
        elif isinstance(note, Refusal):
            yield LOG_TOPIC, log_message(f"refused ({note.code}): {note.message}", time_ns, is_error=True)
        elif isinstance(note, Gap):
            yield LOG_TOPIC, log_message(str(note), time_ns, is_error=True)

    def _draw_on(self, poses: list[Pose]) -> None:
        self._path += poses
        if len(self._path) > _MOST_PATH:  # every segment repeats the path, so a long one is told in longer steps
            del self._path[:-1:2]
