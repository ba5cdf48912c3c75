"""What is wrong with a camera is said, and its frames do not reach the model."""

import pytest

from worldvln_edge.ros_bridge.camera_intake import CameraIntake, CameraIntakeConfig
from worldvln_edge.ros_bridge.diagnostics import Level
from worldvln_edge.ros_bridge.frame_clock import FrameClock
from worldvln_edge.ros_bridge.image_decoding import CompressedImage, RawImage

_MS = 1_000_000
_START = 5_000_000 * _MS


def _image(value: int = 0, height: int = 4, width: int = 6, **changes) -> RawImage:
    fields = {
        "height": height,
        "width": width,
        "encoding": "rgb8",
        "is_bigendian": False,
        "step": 3 * width,
        "data": bytes([value]) * (3 * width * height),
    }
    return RawImage(**{**fields, **changes})


@pytest.fixture
def intake() -> CameraIntake:
    intake = CameraIntake(FrameClock(), started_s=0.0)
    intake.clock.expect_run(_START, 100, fps=20)
    return intake


def _send(intake: CameraIntake, index: int, message=None, *, source: str = "camera", stamp_ms: float | None = None):
    """The message of `index` at 20 a second; its time of arrival."""
    now_s = index * 0.05
    stamp_ns = _START + int((50 * index if stamp_ms is None else stamp_ms) * _MS)
    intake.receive(_image(index) if message is None else message, stamp_ns=stamp_ns, source=source, now_s=now_s)
    return now_s


def _errors(intake: CameraIntake, now_s: float) -> dict[str, str]:
    return {check.name: check.text for check in intake.diagnostics(now_s) if check.level == Level.ERROR}


def test_frames_of_a_healthy_camera_come_decoded_and_in_order(intake):
    frames = []
    for index in range(10):
        now_s = _send(intake, index)
        frames += intake.take(now_s)
    assert [frame.stamp_ns for frame in frames] == [_START + 50 * index * _MS for index in range(10)]
    assert [int(frame.image_HW3[0, 0, 0]) for frame in frames] == list(range(10))
    assert frames[0].image_HW3.shape == (4, 6, 3)
    assert [check.level for check in intake.diagnostics(now_s)] == [Level.OK] * 4


@pytest.mark.parametrize(
    ("message", "check", "text"),
    [
        (_image(encoding="32FC1"), "camera/images", "encoding '32FC1' is not known; publish one of"),
        (_image(data=b"short"), "camera/images", "5 bytes of data, but 4 rows"),
        (_image(height=8), "camera/images", "image size changed from 6x4 to 6x8; keep one size for the whole flight"),
    ],
)
def test_a_wrong_image_is_named_and_stops_the_frames_until_it_is_over(intake, message, check, text):
    _send(intake, 0)
    assert len(intake.take(0.0)) == 1
    now_s = _send(intake, 1, message)
    assert text in _errors(intake, now_s)[check]
    assert intake.take(now_s) == []
    assert intake.is_usable(now_s + 3) is False  # by then images are missing
    assert "camera/images" not in _errors(intake, now_s + 3)


def test_compressed_bytes_that_are_no_image_leave_a_hole_that_is_named(intake):
    now_s = _send(intake, 0, CompressedImage(format="jpeg", data=b"no image"))
    assert intake.take(now_s) == []
    assert "not a readable image; publish whole JPEG or PNG images" in _errors(intake, now_s)["camera/images"]
    assert intake.clock.broken is not None


def test_two_publishers_are_named_and_none_is_believed(intake):
    _send(intake, 0, source="front")
    now_s = _send(intake, 1, source="back")
    expected = "2 publishers on the camera topic: back, front; stop all but one, or give each camera its own topic"
    assert _errors(intake, now_s) == {"camera/publishers": expected}
    assert intake.take(now_s) == []


def test_one_of_two_publishers_is_believed_again_when_the_other_has_gone():
    intake = CameraIntake(FrameClock(), started_s=0.0, config=CameraIntakeConfig(finding_s=0.2))
    _send(intake, 0, source="back")
    for index in range(1, 10):
        now_s = _send(intake, index, source="front")
    assert _errors(intake, now_s) == {}


def test_a_camera_that_never_comes_or_falls_silent_is_missing(intake):
    assert _errors(intake, 0.4) == {}
    assert _errors(intake, 0.8) == {
        "camera/rate": "no image came within 0.8 s; check the camera topic's name and its driver"
    }
    _send(intake, 0)
    assert _errors(intake, 0.7) == {"camera/rate": "the last image came 0.7 s ago; check the camera and its link"}
    assert intake.take(0.7) == []


def test_stamps_that_jump_back_hold_until_the_flight_starts_anew(intake):
    for index in range(20):
        now_s = _send(intake, index)
    now_s = _send(intake, 20, stamp_ms=1)
    assert "capture times jumped back by 0.949 s" in _errors(intake, now_s)["camera/stamps"]
    assert "camera/stamps" in _errors(intake, now_s + 100)
    intake.restart()
    _send(intake, 21, _image(height=8))
    assert _errors(intake, 21 * 0.05) == {}


def test_doubled_and_late_images_are_warnings_and_frames_go_on(intake):
    _send(intake, 0)
    _send(intake, 1)
    now_s = _send(intake, 2, stamp_ms=50)
    checks = {check.name: check.level for check in intake.diagnostics(now_s)}
    assert checks["camera/stamps"] == Level.WARN
    assert len(intake.take(now_s)) == 2


@pytest.mark.parametrize("name", ["missing_after_s", "finding_s"])
def test_a_config_that_cannot_work_is_refused(name):
    with pytest.raises(ValueError, match=rf"camera\.{name} must be over 0 and below 60 s, found -1"):
        CameraIntakeConfig(**{name: -1.0})
