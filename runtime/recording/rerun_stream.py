"""A session in the Rerun viewer: camera, path, actions and times, from a recording or while it flies.

| entity | what |
|---|---|
| camera | frames as they came |
| predicted | the last frame that the policy expected of a segment (live, where predictions are made) |
| world/path, world/plan, world/body | metres, x forward, y left, z up |
| actions/dx ... actions/dpitch | of every step, as answered; cm, deg |
| milliseconds/... | of every answer and of the stages of every segment |
| log | instructions, holds, refusals, gaps |

Source: rerun.io/docs.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import rerun as rr
from foxglove_schemas_protobuf.FrameTransform_pb2 import FrameTransform
from foxglove_schemas_protobuf.Log_pb2 import Log
from foxglove_schemas_protobuf.PosesInFrame_pb2 import PosesInFrame

from worldvln_edge.images import ImageError, decode_image
from worldvln_edge.poses import ACTION_ORDER
from worldvln_edge.runtime.recording.foxglove_messages import (
    LOG_TOPIC,
    PATH_TOPIC,
    PLAN_TOPIC,
    POSE_TOPIC,
    image_format,
)
from worldvln_edge.runtime.recording.recording_messages import (
    Answer,
    Closing,
    Instruction,
    Message,
    Opening,
    Picture,
    Prediction,
    Segment,
)
from worldvln_edge.runtime.recording.session_track import SessionTrack

APPLICATION = "worldvln-edge"
_CLOCK, _STEP = "clock", "step"
_SHOWN_ENCODED = ("jpeg", "png")


class RerunStream:
    """One session, as a context manager: what was sent is flushed at its end.

    Args:
        uid: of the session; the viewer shows two sessions as two recordings.
        save: file to write (.rrd).
        connect: address of a viewer that runs. With neither, a viewer is started on this machine.
    """

    def __init__(self, uid: str, *, save: Path | None = None, connect: str | None = None):
        self._stream = rr.RecordingStream(APPLICATION, recording_id=uid)
        if save is not None:
            self._stream.save(save)
        elif connect is not None:
            self._stream.connect_grpc(connect)
        else:
            self._stream.spawn()
        self._track = SessionTrack()
        self._steps = 0

    def __enter__(self) -> RerunStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Send what waits."""
        self._stream.flush()
        self._stream.disconnect()

    def add(self, message: Message, time_ns: int) -> None:
        """Show a message; those that a viewer has no use for are passed over."""
        self._stream.set_time(_CLOCK, timestamp=np.datetime64(time_ns, "ns"))
        if isinstance(message, Picture):
            self._add_picture(message)
            return
        if isinstance(message, Prediction):
            self._stream.log("predicted", rr.Image(message.frames[-1]))
            return
        if isinstance(message, Opening | Instruction):
            self._stream.log("log", rr.TextLog(f"instruction: {message.prompt}", level="INFO"))
        elif isinstance(message, Segment):
            self._add_segment(message)
        elif isinstance(message, Answer):
            for name in ("queue", "decode", "infer", "total"):
                self._stream.log(f"milliseconds/{name}", rr.Scalars(getattr(message, f"{name}_ms")))
        elif isinstance(message, Closing):
            self._stream.log("log", rr.TextLog(f"the session left the server: {message.reason}", level="INFO"))
        for topic, data in self._track.draw(message, time_ns):
            self._draw(topic, data)

    def _add_picture(self, picture: Picture) -> None:
        shown: rr.Image | rr.EncodedImage
        if picture.raw_hw is not None:
            shown = rr.Image(np.frombuffer(picture.data, np.uint8).reshape(*picture.raw_hw, 3))
        elif (kind := image_format(picture.data)) in _SHOWN_ENCODED:
            shown = rr.EncodedImage(contents=picture.data, media_type=f"image/{kind}")
        else:
            try:
                shown = rr.Image(decode_image(picture.data))
            except ImageError:  # an image larger than the defaults allow is not worth a viewer's memory
                return
        self._stream.log("camera", shown)

    def _add_segment(self, segment: Segment) -> None:
        for name, spent_ms in segment.stages_ms.items():
            self._stream.log(f"milliseconds/segment/{name}", rr.Scalars(spent_ms))
        for action in segment.answered_actions():
            self._stream.set_time(_STEP, sequence=self._steps)
            self._steps += 1
            for name, value in zip(ACTION_ORDER, action.tolist(), strict=True):
                self._stream.log(f"actions/{name}", rr.Scalars(value))

    def _draw(self, topic: str, data: bytes) -> None:
        if topic in (PATH_TOPIC, PLAN_TOPIC):
            poses = PosesInFrame.FromString(data).poses
            points = np.array([[pose.position.x, pose.position.y, pose.position.z] for pose in poses]).reshape(-1, 3)
            self._stream.log(f"world{topic}", rr.LineStrips3D([points]))
        elif topic == POSE_TOPIC:
            at = FrameTransform.FromString(data).translation
            self._stream.log("world/body", rr.Points3D([[at.x, at.y, at.z]], radii=0.1))
        elif topic == LOG_TOPIC:
            line = Log.FromString(data)
            level = "ERROR" if line.level == Log.ERROR else "WARN"
            self._stream.log("log", rr.TextLog(line.message, level=level))
