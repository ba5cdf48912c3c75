"""Scale schedule: which steps exist, what they see, where their frames lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.config import ConfigError, ScheduleConfig
from worldvln_edge.presets import preset
from worldvln_edge.scale_schedule import ScaleSchedule, aspect_templates, pixel_budget_scales

RELEASED = preset("worldvln-8b").schedule


def _config(scales: int = 3, **changes) -> ScheduleConfig:
    sizes = tuple((i + 1, i + 1) for i in range(scales))
    fields = {
        "scale_hw": sizes,
        "image_repetition": (2,) * scales,
        "video_repetition": (1,) * scales,
        "semantic_scales": 2,
        "frames_inner_clip": 2,
    }
    return ScheduleConfig(**{**fields, **changes})


def test_released_horizon_has_159_steps_and_50752_tokens_over_all_scales():
    schedule = ScaleSchedule(RELEASED, 13)
    steps = list(schedule.steps())
    assert len(steps) == 42 + 3 * 39
    assert [step.real_scale_id for step in steps] == list(range(159))
    assert sum(step.tokens for step in steps if step.is_last_repetition) == 50_752
    assert [(clip.first_frame, clip.frames) for clip in schedule.clips] == [(0, 1), (1, 4), (5, 4), (9, 4)]


def test_released_references_are_the_served_ones():
    schedule = ScaleSchedule(RELEASED, 13)
    sids = [[clip * 14 + scale for clip, scale in schedule.references(k)] for k in range(4)]
    assert sids == [[], [13], [27, 11], [41, 25, 9]]
    assert [schedule.scales_referred_to(k) for k in range(4)] == [(13, 11, 9), (13, 11), (13,), ()]


@given(st.integers(1, 40), st.integers(1, 6))
def test_clips_cover_every_latent_frame_once(latent_frames: int, per_clip: int):
    schedule = ScaleSchedule(_config(frames_inner_clip=per_clip), latent_frames)
    frames = [f for clip in schedule.clips for f in range(latent_frames)[clip.frame_slice]]
    assert frames == list(range(latent_frames))
    assert schedule.clips[0].frames == 1
    for clip in schedule.clips:
        assert {step.thw[0] for step in clip.steps} == {clip.frames}
        assert [step.step_in_clip for step in clip.steps] == list(range(len(clip.steps)))


@given(st.integers(2, 9), st.integers(0, 2), st.integers(1, 3), st.integers(2, 8))
def test_references_are_earlier_and_the_lists_agree(clips: int, largest: int, interval: int, context_frames: int):
    config = _config(context_from_largest_no=largest, context_interval=interval, context_frames=context_frames)
    schedule = ScaleSchedule(config, 1 + 2 * (clips - 1))
    for k in range(clips):
        references = schedule.references(k)
        assert len(set(references)) == len(references)
        assert all(clip < k and 0 <= scale < 3 for clip, scale in references)
        assert largest <= 0 or len(references) == min(k, context_frames // 2)
        for clip, scale in references:
            assert scale in schedule.scales_referred_to(clip)
        for scale in range(3):
            own = schedule.references_of_scale(k, scale)[len(references) :]
            assert own == (() if largest > 0 else tuple((k, s) for s in range(scale)))


def test_last_step_is_the_last_repetition():
    schedule = ScaleSchedule(_config(), 3)
    assert schedule.last_step(0, 1).repetition == 1
    assert schedule.last_step(1, 1).repetition == 0
    assert schedule.last_step(0, 1).is_semantic
    assert not schedule.last_step(0, 2).is_semantic


def test_a_schedule_needs_a_frame():
    with pytest.raises(ConfigError, match="at least one latent frame"):
        ScaleSchedule(_config(), 0)


@pytest.mark.parametrize(("budget", "scales"), [("0.06M", 11), ("0.25M", 13), ("0.40M", 14), ("0.90M", 15)])
def test_budget_says_how_many_scales(budget: str, scales: int):
    assert len(pixel_budget_scales(budget, 1.0)) == scales


def test_templates_are_the_published_ones():
    keys = [1.0, 0.861, 1.16, 0.753, 1.326, 0.671, 1.489, 0.562, 1.777, 0.494, 2.023, 0.4, 2.5, 0.336, 2.971]
    assert list(aspect_templates()) == keys
    assert pixel_budget_scales("0.40M", 0.562)[-1] == (30, 53)
    assert pixel_budget_scales("0.40M", 0.55) == pixel_budget_scales("0.40M", 0.562)


def test_unknown_budget_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown pixel budget '1M'; choose one of 0\.06M, 0\.25M"):
        pixel_budget_scales("1M", 1.0)
