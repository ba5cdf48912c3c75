"""Which frames a row shows: the golden cases, every mode, every filter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.training.data.frame_selection import (
    FrameSelection,
    UnusableRowError,
    is_clip_length,
    reference_frames,
    select_frames,
)

MODES = ("duration", "fixed_full", "segment_full", "segment_full_floor_sec", "whole")


def select(mode: str = "duration", begin: int = 0, end: int = 48, fps: float = 16.0, **config: Any) -> list[int]:
    return list(select_frames(FrameSelection(mode=mode, **config), begin=begin, end=end, fps=fps))  # type: ignore[arg-type]


@pytest.mark.golden
def test_frames_are_the_golden_ones(golden: Callable[[str], Path]):
    cases = json.loads((golden("training") / "frame_rules.json").read_text())
    assert cases
    for case in cases:
        segment = {key: case[key] for key in ("begin", "end", "fps")}
        frames = select(**segment)
        assert frames == case["product_frame_idxs"]
        assert len(frames) == case["expected"]["sample_frames"]
        assert (len(frames) - 1) // 4 + 1 == case["expected"]["latent_frames"]


@pytest.mark.golden
def test_reference_rule_is_the_published_one(golden: Callable[[str], Path]):
    for case in json.loads((golden("training") / "frame_rules.json").read_text()):
        segment = {key: case[key] for key in ("begin", "end", "fps")}
        frames = reference_frames(
            FrameSelection(), **segment, container_fps=case["container_fps"], container_frames=case["vlen"]
        )
        assert list(frames) == case["expected"]["reference_frame_idxs"]


def test_reference_rule_refuses_a_segment_after_the_video():
    with pytest.raises(UnusableRowError, match=r"segment ends at 3\.06 s, the video at 2\.50 s"):
        reference_frames(
            FrameSelection(mode="segment_full"), begin=0, end=48, fps=16, container_fps=16, container_frames=40
        )


@given(
    mode=st.sampled_from(MODES),
    begin=st.integers(0, 500),
    length=st.integers(0, 700),
    fps=st.sampled_from([8.0, 15.0, 16.0, 23.976, 30.0, 60.0]),
)
def test_rows_are_4k_plus_1_frames_of_their_segment(mode: str, begin: int, length: int, fps: float):
    frames = select(mode, begin, begin + length, fps)
    assert is_clip_length(len(frames))
    assert frames == sorted(frames)
    assert begin <= frames[0]
    assert frames[-1] <= begin + length
    if mode != "whole":
        assert len(frames) <= 49


@given(end=st.integers(0, 400), fps=st.sampled_from([15.0, 16.0, 30.0]))
def test_the_whole_segment_is_left_by_less_than_a_latent_frame(end: int, fps: float):
    frames = select("whole", 0, end, fps)
    assert end - frames[-1] <= 4 * fps / 16 + 1


@pytest.mark.parametrize(
    ("mode", "end", "count", "last"),
    [
        ("duration", 47, 33, 32),  # whole seconds: one frame short of three
        ("duration", 500, 49, 48),  # capped
        ("duration", 10, 1, 0),
        ("fixed_full", 96, 49, 96),
        ("fixed_full", 24, 49, 24),
        ("segment_full", 96, 49, 96),
        ("segment_full", 19, 17, 19),  # spread, so the last frame is shown
        ("segment_full_floor_sec", 30, 17, 30),
        ("whole", 100, 101, 100),
    ],
)
def test_every_mode_takes_what_it_says(mode: str, end: int, count: int, last: int):
    frames = select(mode, 0, end)
    assert (len(frames), frames[-1]) == (count, last)


def test_spread_frames_are_even():
    assert select("segment_full", 100, 196) == list(range(100, 197, 2))


def test_listed_frames_override_the_mode():
    for mode in MODES:
        config = FrameSelection(mode=mode)  # type: ignore[arg-type]
        assert select_frames(config, begin=0, end=1, fps=16, explicit=[9, 3, 3, 40, 2]) == (9, 3, 3, 40, 2)


@pytest.mark.parametrize(
    ("explicit", "message"),
    [([1, 2], "2 frames, which is not 4k"), ([], "0 frames"), ([-1], "holds -1; frames count from 0")],
)
def test_listed_frames_that_do_not_work_are_refused(explicit: list[int], message: str):
    with pytest.raises(UnusableRowError, match=message):
        select_frames(FrameSelection(), begin=0, end=48, fps=16, explicit=explicit)


def test_short_lists_are_filtered_in_the_full_modes_only():
    config = FrameSelection(mode="segment_full", min_video_frames=9)
    with pytest.raises(UnusableRowError, match="5 frames, fewer than 9"):
        select_frames(config, begin=0, end=48, fps=16, explicit=[0, 1, 2, 3, 4])
    select_frames(FrameSelection(min_video_frames=9), begin=0, end=48, fps=16, explicit=[0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 5, "end": 4}, "begin_frame_id 5 and end_frame_id 4 are no segment"),
        ({"begin": -1, "end": 4}, "are no segment"),
        ({"fps": 0.0}, r"fps must be 0\.1 to 1000, found 0"),
        ({"fps": float("nan")}, "fps must be"),
        ({"fps": 5e-324}, "fps must be"),
        ({"end": 10**400}, "segment of more than"),
        ({"end": 30, "min_video_frames": 33}, "segment of 1 s is shorter than 33 frames"),
        ({"end": 80, "drop_long_video": True}, "segment of 5 s is longer than 3 s"),
        ({"mode": "whole", "end": 10**20}, "segment of more than 100000 frames"),
        ({"mode": "segment_full", "end": 9, "min_video_frames": 11}, "segment of 10 frames is shorter than 11"),
    ],
)
def test_segments_that_give_no_row_say_why(arguments: dict[str, Any], message: str):
    with pytest.raises(UnusableRowError, match=message):
        select(**arguments)


def test_video_frames_must_fit_the_vae():
    with pytest.raises(ValueError, match=r"video_frames must be 4k\+1, found 48"):
        FrameSelection(video_frames=48)
