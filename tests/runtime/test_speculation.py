"""Segments generated before their frames are there: when they are taken, what they rest on, and what they never do."""

import itertools

import numpy as np
import pytest
from small_models import random_frames

from worldvln_edge.runtime.bench.full_horizon import FullHorizonFlight, _FullHorizonDriver
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.worldvln.kv_cache import KVCache
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.text_cache import TextCache
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, WorldVLNSession, load_policy

PROMPT, OTHER = "fly forward 5 m", "turn left to the tower"
POINTS = (1, 5, 9)


@pytest.fixture(scope="module")
def plain(tiny_bundle) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def frames(plain) -> list[np.ndarray]:
    return random_frames(plain.config, 13, seed=7)


def speculating(plain: WorldVLNPolicy, threshold: float) -> WorldVLNPolicy:
    config = SpeculationConfig(threshold=threshold)
    return WorldVLNPolicy(plain.manifest, plain.engines, plain.tokenizer, speculation=config)


def fly(session: WorldVLNSession, frames: list[np.ndarray]) -> list[ActionChunk]:
    chunks, sent = [], 0
    for point in POINTS:
        chunks.append(session.observe(frames[sent:point]))
        sent = point
        session.work_ahead()
    return chunks


def actions_of(chunks: list[ActionChunk]) -> np.ndarray:
    return np.concatenate([chunk.actions for chunk in chunks])


def test_what_does_not_come_as_predicted_is_generated_anew(plain, frames):
    session = speculating(plain, 1.0).new_session(PROMPT, seed=1)
    chunks = fly(session, frames)
    np.testing.assert_array_equal(actions_of(chunks), actions_of(fly(plain.new_session(PROMPT, seed=1), frames)))
    report = session.speculated
    assert (report.segments, report.finished, report.accepted) == (2, 2, 0)
    assert report.saved_s == 0 < report.added_s
    assert all(0 < agreement < 1 for agreement in report.agreements)
    assert [chunk.profile_reason for chunk in chunks] == ["", "", ""]
    assert not any(chunk.was_ready for chunk in chunks)


def test_work_of_speculation_is_counted_apart(plain, frames):
    policy = speculating(plain, 1.0)
    ahead = policy.new_session(PROMPT, seed=1)
    fly(ahead, frames)
    policy.speculation, policy.texts = None, TextCache()
    exact = policy.new_session(PROMPT, seed=1)
    fly(exact, frames)
    assert ahead.counters == exact.counters
    per_clip = sum(step.tokens for step in plain.tables.schedule.clips[1].steps)
    assert ahead.speculated.added_token_steps > 2 * per_clip  # two clips, and the context of what was predicted


def test_an_accepted_segment_is_what_the_predicted_frames_lead_to(plain, frames):
    """Against the research server's schedule, which is told the observed bits and the predicted ones."""
    policy = speculating(plain, 0.0)
    session = policy.new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    predicted = session.last_prediction
    session.work_ahead()
    chunk = session.observe(frames[1:5])
    driver = _FullHorizonDriver(plain.engines, plain.tables, KVCache(plain.workspace))
    driver.set_text(plain.encode_text(PROMPT, ""))
    codes = driver.generate_all({0: session.observed_clips[0].bits, 1: predicted[0].bits}, 1)
    np.testing.assert_allclose(session.last_prediction[0].codes, codes[2], atol=1e-6)
    expected = FullHorizonFlight(plain, PROMPT)._actions(np.concatenate(codes, axis=1), 5, 9)
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-3)
    assert chunk.profile_reason.startswith("generated ahead; ")
    assert "came as predicted" in chunk.profile_reason
    assert chunk.was_ready
    assert "world_model_step" not in chunk.timings_ms
    report = session.speculated
    assert (report.segments, report.finished, report.accepted) == (1, 1, 1)
    assert report.saved_s > 0 == report.added_s


def test_after_an_accepted_segment_the_real_frames_count(plain, frames):
    session, exact = speculating(plain, 0.0).new_session(PROMPT, seed=1), plain.new_session(PROMPT, seed=1)
    fly(session, frames)
    fly(exact, frames)
    for ours, theirs in zip(session.observed_clips, exact.observed_clips, strict=True):
        np.testing.assert_array_equal(ours.codes, theirs.codes)


def test_breaking_off_and_going_on_changes_nothing(plain, frames):
    policy = speculating(plain, 0.0)
    expected = actions_of(fly(policy.new_session(PROMPT, seed=1), frames))
    session, chunks, sent, pauses = policy.new_session(PROMPT, seed=1), [], 0, 0
    other = plain.new_session(OTHER, seed=2)
    other_frames = iter(frames)
    for point in POINTS:
        chunks.append(session.observe(frames[sent:point]))
        sent = point
        asked = itertools.count()
        while session.work_ahead(lambda: next(asked) % 3 == 2):  # noqa: B023
            pauses += 1
            if (frame := next(other_frames, None)) is not None:
                other.observe([frame])  # another flight uses engines and buffers meanwhile
    assert pauses >= 4
    np.testing.assert_array_equal(actions_of(chunks), expected)


def test_unfinished_speculation_is_dropped_when_the_frames_are_there(plain, frames):
    session = speculating(plain, 0.0).new_session(PROMPT, seed=1)
    expected = actions_of(fly(plain.new_session(PROMPT, seed=1), frames))
    chunks, sent = [], 0
    for point in POINTS:
        chunks.append(session.observe(frames[sent:point]))
        sent = point
        asked = itertools.count()
        session.work_ahead(lambda: next(asked) > 1)  # noqa: B023
    np.testing.assert_array_equal(actions_of(chunks), expected)
    report = session.speculated
    assert (report.segments, report.finished, report.accepted) == (2, 0, 0)
    assert report.added_token_steps > 0


@pytest.mark.parametrize("change", ["prompt", "negative prompt", "seed"])
def test_another_instruction_is_not_answered_from_an_old_guess(plain, frames, change: str):
    def flight(policy: WorldVLNPolicy) -> np.ndarray:
        session = policy.new_session(PROMPT, seed=1)
        session.observe(frames[:1])
        session.work_ahead()
        if change == "prompt":
            session.set_prompt(OTHER)
        elif change == "negative prompt":
            session.set_negative_prompt(OTHER)
        else:
            session.set_seed(9)
        return session.observe(frames[1:5]).actions

    np.testing.assert_array_equal(flight(speculating(plain, 0.0)), flight(plain))


def test_nothing_is_guessed_where_frames_are_ahead_anyway(plain, frames):
    policy = speculating(plain, 0.0)
    behind = policy.new_session(PROMPT, seed=1, emit="behind")
    behind.observe(frames[:5])
    assert not behind.work_ahead()
    all_at_once = policy.new_session(PROMPT, seed=1)
    while all_at_once.observe(frames if all_at_once.frames == 0 else ()) is not None:
        all_at_once.work_ahead()
    assert all_at_once.done
    for session in (behind, all_at_once):
        assert session.speculated.finished == session.speculated.added_token_steps == 0


def test_a_failing_engine_drops_the_guess_and_nothing_else(plain, frames):
    policy = speculating(plain, 0.0)
    session = policy.new_session(PROMPT, seed=1)
    first = session.observe(frames[:1])
    engines = policy.engines["world_model_step"]

    class Failing:
        def run(self, *args, **options):
            raise RuntimeError("device lost")

    session._driver._engines = {**policy.engines, "world_model_step": Failing()}
    with pytest.raises(RuntimeError, match="device lost"):
        session.work_ahead()
    session._driver._engines = {**policy.engines, "world_model_step": engines}
    second = session.observe(frames[1:5])
    exact = plain.new_session(PROMPT, seed=1)
    expected = [exact.observe(frames[:1]).actions, exact.observe(frames[1:5]).actions]
    np.testing.assert_array_equal([first.actions, second.actions], expected)


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_threshold_is_a_share(threshold: float):
    with pytest.raises(ValueError, match=r"within 0\.\.1"):
        SpeculationConfig(threshold=threshold)
