"""Pictures and poses as Foxglove's own messages, which its panels draw without being told how.

A pose of ours is x forward, y right, z up in cm and deg; Foxglove's axes are right-handed in m: y is turned round, and
with it the sense of roll and yaw.
Source: spec/session_protocol.md 3; foxglove.dev/docs, "message schemas".
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence

from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.FrameTransform_pb2 import FrameTransform
from foxglove_schemas_protobuf.Log_pb2 import Log
from foxglove_schemas_protobuf.Pose_pb2 import Pose
from foxglove_schemas_protobuf.PosesInFrame_pb2 import PosesInFrame
from foxglove_schemas_protobuf.Quaternion_pb2 import Quaternion
from foxglove_schemas_protobuf.RawImage_pb2 import RawImage
from foxglove_schemas_protobuf.Vector3_pb2 import Vector3
from google.protobuf.timestamp_pb2 import Timestamp
from PIL import Image

from worldvln_edge.image_header import BadHeaderError, UnknownFormatError, read_image_header
from worldvln_edge.runtime.recording.recording_messages import (
    CAMERA_TOPIC,
    PREDICTION_TOPIC,
    RAW_CAMERA_TOPIC,
    Picture,
    Prediction,
)

_PREDICTION_QUALITY = 90
WORLD, BODY, CAMERA = "world", "body", "camera"
POSE_TOPIC, PATH_TOPIC, PLAN_TOPIC, LOG_TOPIC = "/tf", "/path", "/plan", "/log"
VIEWER_TOPICS = {
    PREDICTION_TOPIC: CompressedImage,
    POSE_TOPIC: FrameTransform,
    PATH_TOPIC: PosesInFrame,
    PLAN_TOPIC: PosesInFrame,
    LOG_TOPIC: Log,
}
PICTURE_TOPICS = {CAMERA_TOPIC: CompressedImage, RAW_CAMERA_TOPIC: RawImage}


def picture_message(picture: Picture, time_ns: int) -> tuple[str, bytes]:
    """Topic and message of a picture; its bytes stand in the message as they are."""
    if picture.raw_hw is None:
        compressed = CompressedImage(
            timestamp=_stamp(time_ns), frame_id=CAMERA, data=picture.data, format=image_format(picture.data)
        )
        return CAMERA_TOPIC, compressed.SerializeToString()
    height, width = picture.raw_hw
    raw = RawImage(
        timestamp=_stamp(time_ns),
        frame_id=CAMERA,
        width=width,
        height=height,
        encoding="rgb8",
        step=3 * width,
        data=picture.data,
    )
    return RAW_CAMERA_TOPIC, raw.SerializeToString()


def prediction_messages(prediction: Prediction, time_ns: int) -> Iterator[tuple[int, int, bytes]]:
    """Index, time and message of every predicted frame, at the time at which it should come true."""
    for number, frame in enumerate(prediction.frames):
        at_ns = time_ns + (number + 1) * 10**9 // prediction.fps
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=_PREDICTION_QUALITY)
        shown = CompressedImage(timestamp=_stamp(at_ns), frame_id=CAMERA, data=buffer.getvalue(), format="jpeg")
        yield prediction.first + number, at_ns, shown.SerializeToString()


def read_picture(topic: str, data: bytes, index: int) -> Picture:
    """The picture that `picture_message` has written.

    Raises:
        google.protobuf.message.DecodeError: it is no such message.
        ValueError: raw pixels of another size than it says.
    """
    if topic == CAMERA_TOPIC:
        return Picture(index=index, data=CompressedImage.FromString(data).data)
    raw = RawImage.FromString(data)
    if len(raw.data) != raw.height * raw.width * 3:
        raise ValueError(f"raw picture {index} of {raw.width}x{raw.height} has {len(raw.data)} bytes")
    return Picture(index=index, data=raw.data, raw_hw=(raw.height, raw.width))


def image_format(data: bytes) -> str:
    """jpeg, png, webp or bmp, told by the content; empty where it is none of them."""
    try:
        return read_image_header(data).format.lower()
    except (UnknownFormatError, BadHeaderError):
        return ""


def transform_message(pose: Pose, time_ns: int) -> bytes:
    """Where the body is in the world; a pose of `viewer_pose`."""
    return FrameTransform(
        timestamp=_stamp(time_ns),
        parent_frame_id=WORLD,
        child_frame_id=BODY,
        translation=pose.position,
        rotation=pose.orientation,
    ).SerializeToString()


def path_message(poses: Iterable[Pose], time_ns: int) -> bytes:
    """A path in the world, of poses of `viewer_pose`."""
    return PosesInFrame(timestamp=_stamp(time_ns), frame_id=WORLD, poses=poses).SerializeToString()


def log_message(text: str, time_ns: int, *, is_error: bool) -> bytes:
    """A line of the log panel."""
    level = Log.ERROR if is_error else Log.WARNING
    return Log(timestamp=_stamp(time_ns), level=level, name="worldvln-edge", message=text).SerializeToString()


def viewer_pose(pose_cm_deg: Sequence[float]) -> Pose:
    """A pose [x, y, z, roll, yaw, pitch] in cm and deg, in Foxglove's axes.

    The rotation is Rx(roll) Ry(pitch) Rz(yaw), as in rigid_motion.py, seen in the mirror that turns y round.
    """
    x, y, z, roll, yaw, pitch = pose_cm_deg
    (ca, sa), (cb, sb), (cc, sc) = (_half_angle(degrees) for degrees in (-roll, pitch, -yaw))
    rotation = Quaternion(
        x=sa * cb * cc + ca * sb * sc,
        y=ca * sb * cc - sa * cb * sc,
        z=ca * cb * sc + sa * sb * cc,
        w=ca * cb * cc - sa * sb * sc,
    )
    return Pose(position=Vector3(x=x / 100, y=-y / 100, z=z / 100), orientation=rotation)


def _half_angle(degrees: float) -> tuple[float, float]:
    half = math.radians(degrees) / 2
    return math.cos(half), math.sin(half)


def _stamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)
