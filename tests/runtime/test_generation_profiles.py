"""Profiles leave out what they say and nothing else, and refuse what cannot be left out."""

from pathlib import Path

import numpy as np
import pytest
from small_models import random_frames, tiny_config

from worldvln_edge.config import ConfigError
from worldvln_edge.generation_profile import EXACT, GenerationProfile, built_in_profiles, model_profiles, read_profiles
from worldvln_edge.presets import PRESET_NAMES, preset
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy
from worldvln_edge.scale_schedule import ScaleSchedule

PROMPT = "fly forward 5 m"


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def frames(policy: WorldVLNPolicy) -> list[np.ndarray]:
    return random_frames(policy.config, 9, seed=7)


def fly(policy: WorldVLNPolicy, frames, profile: GenerationProfile, *, negative_prompt: str = ""):
    session = policy.new_session(PROMPT, seed=1, negative_prompt=negative_prompt)
    session.profile = profile
    chunks, calls, sent = [], [], 0
    for point in (1, 5, 9):
        before = session.counters
        chunks.append(session.observe(frames[sent:point]))
        sent = point
        calls.append({name: count - before[name] for name, count in session.counters.items()})
        session.work_ahead()
    assert {chunk.profile for chunk in chunks} == {profile.name}
    return np.concatenate([chunk.actions for chunk in chunks]), calls


def test_profile_that_leaves_nothing_out_is_exact(policy, frames):
    exact, calls = fly(policy, frames, policy.profiles[EXACT])
    same = GenerationProfile(name="same", max_repetitions=(2, 2, 1), skipped_scales=0, guided_scales=3)
    actions, same_calls = fly(policy, frames, same)
    np.testing.assert_array_equal(actions, exact)
    assert [call["token_steps"] for call in same_calls[1:]] == [call["token_steps"] for call in calls[1:]]


def test_repetitions_that_are_left_out_are_not_run(policy, frames):
    _, exact = fly(policy, frames, policy.profiles[EXACT])
    _, once = fly(policy, frames, GenerationProfile(name="once", max_repetitions=1))
    assert exact[1]["world_model_calls"] - once[1]["world_model_calls"] == 2  # scales 0 and 1 have two repetitions


def test_scales_that_are_left_out_are_not_run_and_the_rest_is_the_upsampled_sum(policy, frames):
    session = policy.new_session(PROMPT, seed=1, record=True)
    session.profile = GenerationProfile(name="coarse", skipped_scales=1)
    assert np.isfinite(session.observe(frames[:1]).actions).all()
    clip = session.last_prediction[0]
    assert len(clip.bits) == 4
    exact = policy.new_session(PROMPT, seed=1, record=True)
    exact.observe(frames[:1])
    for coarse, full in zip(clip.bits, exact.last_prediction[0].bits, strict=False):
        np.testing.assert_array_equal(coarse, full)


def test_without_guidance_the_unconditional_row_has_no_say(policy, frames):
    unguided = GenerationProfile(name="unguided", guided_scales=0)
    plain, _ = fly(policy, frames, unguided)
    negative, _ = fly(policy, frames, unguided, negative_prompt="back")
    np.testing.assert_array_equal(plain, negative)
    guided, _ = fly(policy, frames, policy.profiles[EXACT])
    assert np.abs(plain - guided).max() > 0.1


def test_without_guidance_keys_and_values_of_one_row_are_kept(policy, frames):
    held = []
    for guided in (0, None):
        session = policy.new_session(PROMPT, seed=1)
        session.profile = GenerationProfile(name="p", guided_scales=guided)
        session.observe(frames[:1])
        text_bytes = session._driver._cache._stored["text"].size_bytes
        held.append(session.kv_bytes - text_bytes)
    assert held[1] == 2 * held[0]


def test_guidance_may_come_back_in_the_next_segment(policy, frames):
    expected, _ = fly(policy, frames, policy.profiles[EXACT])
    session = policy.new_session(PROMPT, seed=1)
    session.profile = GenerationProfile(name="unguided", guided_scales=0)
    session.observe(frames[:1])
    session.work_ahead()
    session.profile = policy.profiles[EXACT]
    np.testing.assert_array_equal(session.observe(frames[1:5]).actions, expected[4:8])


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_built_in_profiles_fit_every_preset_and_each_does_less_than_the_one_before(name: str):
    config = preset(name)
    schedule = ScaleSchedule(config.schedule, 13)
    work = []
    for profile in built_in_profiles(config.schedule).values():
        profile.check(config.schedule, clips_per_segment=1)
        steps = list(profile.steps(schedule.clips[1], config.schedule.scales_per_clip))
        assert steps[-1].is_last_repetition
        work.append(sum(each.step.tokens * (2 if each.is_guided else 1) for each in steps))
    assert work[0] > work[1] > work[2] > 0


@pytest.mark.parametrize(
    ("name", "balanced", "fast"),
    [("worldvln-8b", 2.0, 5.0), ("narrow", 2.0, 5.0), ("mini", 2.0, 4.0), ("nano", 2.0, 4.0)],
)
def test_built_in_profiles_save_the_work_that_they_are_meant_to_save(name: str, balanced: float, fast: float):
    """Tokens of a clip and of the newest observed scale, over both rows; small grids have less to leave out."""
    config = preset(name)
    schedule, scales = ScaleSchedule(config.schedule, 13), config.schedule.scales_per_clip
    work = {}
    for profile in model_profiles(config).values():
        generated = sum(each.step.tokens * (1 + each.is_guided) for each in profile.steps(schedule.clips[1], scales))
        observed = schedule.last_step(1, scales - 1).tokens * (1 + profile.is_guided_at_all())
        work[profile.name] = generated + observed
    assert work["exact"] / work["balanced"] >= balanced
    assert work["exact"] / work["fast"] >= fast


def test_clips_of_one_segment_keep_all_their_scales():
    once = tiny_config(repetitions=1, clips_per_segment=2)
    assert list(model_profiles(once)) == ["exact", "balanced"]
    assert model_profiles(once)["balanced"] == GenerationProfile(name="balanced", max_repetitions=1, guided_scales=0)


def test_unknown_profile_names_those_there_are(tiny_bundle):
    with pytest.raises(ConfigError, match="unknown profile 'deep'; choose one of exact, balanced, fast, mine"):
        load_policy(tiny_bundle, threads=1, profiles={"mine": GenerationProfile(name="mine")}, profile="deep")


@pytest.mark.parametrize(
    ("fields", "clips", "message"),
    [
        ({"skipped_scales": 3}, 1, "skips 3 scales of 3; at least one must be left"),
        ({"max_repetitions": (1, 1)}, 1, "has 2 numbers for 3 scales"),
        ({"skipped_scales": 1}, 2, "the next clip of the same segment refers to"),
    ],
)
def test_profile_that_does_not_fit_the_model_is_refused(fields, clips: int, message: str):
    with pytest.raises(ConfigError, match=message):
        GenerationProfile(name="odd", **fields).check(tiny_config().schedule, clips_per_segment=clips)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"name": "a", "max_repetitions": 0}, "max_repetitions must be at least 1, found 0"),
        ({"name": "a", "skipped_scales": -1}, "skipped_scales must be at least 0"),
        ({"name": "a", "guided_scales": -1}, "guided_scales must be at least 0"),
    ],
)
def test_profile_with_a_wrong_number_is_refused(fields, message: str):
    with pytest.raises(ConfigError, match=message):
        GenerationProfile(**fields)


def test_profiles_are_read_from_a_file(tmp_path):
    path = tmp_path / "profiles.json"
    path.write_text('[{"name": "night", "max_repetitions": [2, 1, 1], "guided_scales": 1}]')
    assert read_profiles(path) == {"night": GenerationProfile(name="night", max_repetitions=(2, 1, 1), guided_scales=1)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expected `array`"),
        ('[{"name": "a", "deep": 1}]', "unknown field `deep`"),
        ('[{"name": "a", "skipped_scales": -1}]', "skipped_scales must be at least 0"),
        ('[{"name": "fast"}]', "'fast' is there already"),
        ('[{"name": "a"}, {"name": "a"}]', "'a' is there already"),
    ],
)
def test_file_of_profiles_with_a_fault_is_refused(tmp_path, text: str, message: str):
    path = tmp_path / "profiles.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_profiles(path)
    assert str(path) in str(error.value)


def test_missing_file_of_profiles_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profiles(tmp_path / "none.json")
