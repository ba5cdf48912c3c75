"""Frames are chosen by their capture stamps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.ros_bridge.diagnostics import Level
from worldvln_edge.ros_bridge.frame_clock import FrameClock, FrameClockConfig

_MS = 1_000_000
_START = 1_000_000 * _MS


def _clock(**config) -> FrameClock[int]:
    return FrameClock(FrameClockConfig(**config))


@given(
    period_ms=st.integers(5, 60),
    phase_ms=st.integers(0, 60),
    jitter_ms=st.lists(st.integers(-2, 2), min_size=40, max_size=40),
)
def test_every_slot_gets_the_frame_with_the_nearest_stamp(period_ms, phase_ms, jitter_ms):
    clock = _clock()
    clock.expect_run(_START + 100 * _MS, 8, fps=16)
    stamps = [_START + (phase_ms + index * period_ms + jitter) * _MS for index, jitter in enumerate(jitter_ms)]
    chosen = []
    for stamp in stamps:
        assert clock.push(stamp, stamp) is None
        chosen += clock.take()
    for index, frame in enumerate(chosen):
        assert frame.slot_ns == _START + 100 * _MS + round(index * 1e9 / 16)
        assert frame.frame == frame.stamp_ns
        nearest = min(abs(stamp - frame.slot_ns) for stamp in stamps)
        assert abs(frame.stamp_ns - frame.slot_ns) == nearest
    due = sum(stamps[-1] >= _START + 100 * _MS + round(index * 1e9 / 16) for index in range(8))
    assert len(chosen) == due or clock.broken is not None


def test_arrival_does_not_matter_only_stamps_do():
    early, late = _clock(), _clock()
    for clock in (early, late):
        clock.expect_run(_START, 4, fps=20)
    stamps = [_START + 25 * index * _MS for index in range(8)]
    frames_early = []
    for stamp in stamps:
        early.push(stamp, stamp)
        frames_early += early.take()
    for stamp in stamps:  # the whole second arrives at once
        late.push(stamp, stamp)
    assert late.take() == frames_early
    assert [frame.stamp_ns for frame in frames_early] == stamps[::2]


def test_a_slot_may_become_known_after_its_frame():
    clock = _clock()
    for index in range(20):
        clock.push(_START + 33 * index * _MS, index)
    clock.expect(_START + 100 * _MS)
    assert [frame.frame for frame in clock.take()] == [3]


def test_frames_are_forgotten_when_no_slot_can_ask_for_them():
    clock = _clock(memory_s=0.5)
    for index in range(1000):
        clock.push(_START + 10 * index * _MS, index)
    assert len(clock._frames) <= 51


def test_frames_of_a_waiting_slot_are_kept():
    clock = _clock(memory_s=0.1)
    clock.expect(_START + 2_000 * _MS)
    for index in range(200):
        clock.push(_START + 10 * index * _MS, index)
    assert len(clock._frames) <= 11
    clock.push(_START + 2_000 * _MS, 200)
    assert [frame.frame for frame in clock.take()] == [200]


@pytest.mark.parametrize(
    ("stamp_ms", "level", "message", "what_to_do"),
    [
        (1000, Level.WARN, "two images have the same capture time", "publish every image once"),
        (900, Level.WARN, "an image came 0.100 s late", "look for a slow or lossy link"),
        (100, Level.ERROR, "capture times jumped back by 0.900 s", "let one clock stamp all images"),
        (-(10**6), Level.ERROR, "an image has no capture time (stamp 0)", "have the camera driver set header.stamp"),
    ],
)
def test_wrong_stamps_are_named_and_their_frames_dropped(stamp_ms, level, message, what_to_do):
    clock = _clock()
    assert clock.push(_START + 1000 * _MS, 0) is None
    finding = clock.push(_START + stamp_ms * _MS, 1)
    assert (finding.level, finding.message, finding.name) == (level, message, "camera/stamps")
    assert what_to_do in finding.what_to_do
    assert clock.newest_stamp_ns == _START + 1000 * _MS


def test_after_a_jump_nothing_is_chosen_until_restart():
    clock = _clock()
    clock.expect(_START + 1000 * _MS)
    clock.push(_START + 990 * _MS, 1)
    clock.push(_START, 2)
    clock.push(_START + 1010 * _MS, 3)
    assert clock.take() == []
    clock.restart()
    clock.expect(_START + 10 * _MS)
    clock.push(_START, 4)
    clock.push(_START + 20 * _MS, 5)
    assert [frame.frame for frame in clock.take()] == [4]


def test_a_slot_without_a_frame_breaks_the_sequence():
    clock = _clock()
    clock.expect_run(_START, 3, fps=16)
    clock.push(_START, 0)
    clock.push(_START + 200 * _MS, 1)
    assert [frame.frame for frame in clock.take()] == [0]
    assert clock.broken.text == (
        "no image within 0.04 s of a frame that was due; the nearest lies 0.062 s away; raise the camera's rate above "
        "the model's, or frame_clock.max_skew_s"
    )
    clock.push(_START + 210 * _MS, 2)
    assert clock.take() == []


def test_slots_must_come_in_order():
    clock = _clock()
    clock.expect(_START)
    with pytest.raises(ValueError, match="is not behind the last one"):
        clock.expect(_START)


@pytest.mark.parametrize("name", ["max_skew_s", "jump_back_s", "memory_s"])
def test_a_config_that_cannot_work_is_refused(name):
    with pytest.raises(ValueError, match=rf"frame_clock\.{name} must be over 0 and below 60 s, found 0"):
        FrameClockConfig(**{name: 0.0})
