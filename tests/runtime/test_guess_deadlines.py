"""Deadlines are judged by what is still to be done: where a segment was generated ahead, that is little."""

import time
from pathlib import Path

import numpy as np
import pytest
from small_models import random_frames

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.chained_session import ChainedSession
from worldvln_edge.runtime.sessions.policy import TooLateError
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.latency_model import LatencyModel, ProfileLatency, new_model
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

PROMPT, OTHER = "fly forward 5 m", "turn left to the tower"
SHORT_MS = 2900  # below what the quickest profile is said to need, far above what taking a guess needs
ALWAYS, NEVER = 0.0, 1.0  # thresholds: the tiny model's guesses are never all right


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def frames(plain) -> list[np.ndarray]:
    return random_frames(plain.config, 13, seed=7)


def tuned(plain: WorldVLNPolicy) -> LatencyModel:
    measured = tuple(
        ProfileLatency(profile=profile, segment_s=(seconds,))
        for profile, seconds in zip(plain.profiles.values(), (9.0, 6.0, 3.0), strict=True)
    )
    return new_model(plain.manifest, "board", 1, measured)


def make(plain: WorldVLNPolicy, threshold: float | None, latency: LatencyModel | None, **engines) -> WorldVLNPolicy:
    speculation = None if threshold is None else SpeculationConfig(threshold=threshold)
    policy = WorldVLNPolicy(
        plain.manifest, {**plain.engines, **engines}, plain.tokenizer, latency=latency, speculation=speculation
    )
    if policy.chooser is not None:
        policy.chooser.add = lambda *_: None  # the times stay those of a slow board
    return policy


def work_is_done(server: BackgroundServer) -> None:
    until = time.monotonic() + 60
    while server.server.manager._ahead.is_busy:
        assert time.monotonic() < until
        time.sleep(0.01)


def guessed(plain: WorldVLNPolicy, frames: list[np.ndarray]) -> np.ndarray:
    session = make(plain, ALWAYS, None).new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    session.work_ahead()
    return session.observe(frames[1:5]).actions


def exact(plain: WorldVLNPolicy, frames: list[np.ndarray]) -> np.ndarray:
    session = plain.new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    return session.observe(frames[1:5]).actions


def second_answer(policy: WorldVLNPolicy, frames: list[np.ndarray], **call):
    with BackgroundServer(policy) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(PROMPT, seed=1)
        client.observe(frames[:1])
        work_is_done(server)
        return client.observe(frames[1:5], **call)


def test_too_short_for_a_segment_and_long_enough_for_a_guess_is_answered_with_the_guess(plain, frames):
    answer = second_answer(make(plain, ALWAYS, tuned(plain)), frames, deadline_ms=SHORT_MS)
    assert (answer.segment, answer.is_late) == (1, False)
    assert answer.why.startswith("generated ahead; ")
    expected = guessed(plain, frames)
    np.testing.assert_array_equal(answer.actions, expected)
    assert np.abs(expected - exact(plain, frames)).max() > 0.1


def test_without_a_guess_the_same_deadline_is_refused(plain, frames):
    with pytest.raises(ServerError, match="needs about") as refusal:
        second_answer(make(plain, None, tuned(plain)), frames, deadline_ms=SHORT_MS)
    assert (refusal.value.code, refusal.value.frames) == ("deadline", 5)
    assert refusal.value.retry_ms >= 3000


def test_a_guess_that_is_for_nothing_refuses_the_deadline_and_emits_nothing(plain, frames):
    policy = make(plain, NEVER, tuned(plain))
    with BackgroundServer(policy) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(PROMPT, seed=1)
        client.observe(frames[:1])
        work_is_done(server)
        with pytest.raises(ServerError) as refusal:
            client.observe(frames[1:5], deadline_ms=SHORT_MS)
        assert (refusal.value.code, refusal.value.frames, refusal.value.retry_ms) == ("deadline", 5, 3000)
        answer = client.observe([], segment=1)
    assert (answer.segment, answer.is_late) == (1, False)
    np.testing.assert_allclose(answer.actions, exact(plain, frames), atol=1e-3)


def test_a_new_prompt_is_judged_without_the_guess(plain, frames):
    with pytest.raises(ServerError) as refusal:
        second_answer(make(plain, ALWAYS, tuned(plain)), frames, deadline_ms=SHORT_MS, prompt=OTHER)
    assert refusal.value.code == "deadline"
    assert refusal.value.retry_ms >= 3000


def test_the_same_prompt_again_keeps_the_guess(plain, frames):
    answer = second_answer(make(plain, ALWAYS, tuned(plain)), frames, deadline_ms=SHORT_MS, prompt=PROMPT)
    assert answer.why.startswith("generated ahead; ")


class SlowStep:
    """The world model's step on a slow board."""

    def __init__(self, engine):
        self._engine = engine

    def run(self, *args, **options):
        time.sleep(0.15)
        return self._engine.run(*args, **options)


@pytest.mark.parametrize("threshold", [ALWAYS, NEVER])
def test_a_board_that_was_not_tuned_goes_by_what_its_segments_took(plain, frames, threshold):
    slow = SlowStep(plain.engines[graphs.WORLD_MODEL_STEP])
    policy = make(plain, threshold, None, **{graphs.WORLD_MODEL_STEP: slow})
    with BackgroundServer(policy, warm_up=False) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(PROMPT, seed=1)
        client.observe(frames[:1])
        work_is_done(server)
        took_s = server.server.manager._observations.estimate.seconds
        assert took_s > 0.6
        if threshold == ALWAYS:
            assert client.observe(frames[1:5], deadline_ms=700 * took_s).why.startswith("generated ahead; ")
            return
        with pytest.raises(ServerError) as refusal:
            client.observe(frames[1:5], deadline_ms=700 * took_s)
        assert (refusal.value.code, refusal.value.frames) == ("deadline", 5)


def test_least_time_counts_frames_and_the_guess(plain, frames):
    policy = make(plain, ALWAYS, tuned(plain))
    session = policy.new_session(PROMPT, seed=1)
    assert session.least_s(1) == pytest.approx(3.0)
    session.observe(frames[:1])
    frame_s = policy.times.frames_s(1)
    assert frame_s > 0
    assert session.least_s(4) == pytest.approx(3.0 + 4 * frame_s)
    session.work_ahead()
    assert session.least_s(4) == pytest.approx(4 * frame_s)
    assert session.least_s(4, with_new_settings=True) == pytest.approx(3.0 + 4 * frame_s)
    session.observe(frames[1:5])
    assert policy.times.guess_s > 0
    session.work_ahead()
    expected = policy.times.frames_s(4) + policy.times.guess_s
    assert session.least_s(4) == pytest.approx(expected)
    session.set_seed(2)
    assert session.least_s(4) == pytest.approx(3.0 + policy.times.frames_s(4))


def test_a_chained_flight_knows_of_the_guess_too(plain, frames):
    policy = make(plain, NEVER, tuned(plain))
    session = ChainedSession(policy, PROMPT, horizons=2, seed=1)
    session.observe(frames[:1])
    session.work_ahead()
    assert session.least_s(4) < 1.0
    assert session.least_s(4, with_new_settings=True) > 3.0
    with pytest.raises(TooLateError, match="needs about 3000 ms, and less is left") as late:
        session.observe(frames[1:5], budget_s=2.0)
    assert (late.value.needs_s, session.frames, session.emitted) == (3.0, 5, 0)
    assert session.observe(()).segment == 1


def test_times_that_refused_are_believed_less_until_a_segment_was_flown(plain, frames):
    policy = make(plain, None, tuned(plain))
    with BackgroundServer(policy, warm_up=False) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(PROMPT, seed=1)
        refused = []
        for _ in range(3):
            with pytest.raises(ServerError) as refusal:
                client.observe(frames[:1] if not refused else [], deadline_ms=2600)
            refused.append(refusal.value.retry_ms)
        assert refused[0] > refused[1] > refused[2] > 2600
        assert client.observe([], deadline_ms=2600).segment == 0
        assert server.server.manager._observations.estimate.trust == 1.0
