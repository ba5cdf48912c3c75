"""A model that gives NaN: a hold where there is an envelope, an error where there is none, and never half of either."""

from pathlib import Path

import numpy as np
import pytest
from http_calls import HttpCalls, RememberingPolicy, frame, nonfinite
from small_models import random_frames

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.chained_session import ChainedSession
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.policy import NonFiniteActionsError
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

PROMPT = "fly forward 5 m"
MOTION_TOLERANCE = 1e-3  # cm and deg; another grouping of frames is another order of additions


class BreakableHead:
    """The exported action head, until it is told to give NaN."""

    def __init__(self, engine):
        self._engine, self.is_broken = engine, False

    def run(self, inputs, in_place=None, *, fetch=None):
        outputs = self._engine.run(inputs, in_place, fetch=fetch)
        return {name: value * np.nan for name, value in outputs.items()} if self.is_broken else outputs


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def frames(plain) -> list[np.ndarray]:
    return random_frames(plain.config, 13, seed=7)


@pytest.fixture(scope="module")
def flown(plain, frames) -> list[np.ndarray]:
    session = plain.new_session(PROMPT, seed=1)
    return [session.observe(part).actions for part in (frames[:1], frames[1:5], frames[5:9])]


@pytest.fixture
def head(plain) -> BreakableHead:
    return BreakableHead(plain.engines[graphs.ACTION_HEAD])


@pytest.fixture
def policy(plain, head) -> WorldVLNPolicy:
    return breakable(plain, head)


def breakable(plain: WorldVLNPolicy, head: BreakableHead, **options) -> WorldVLNPolicy:
    return WorldVLNPolicy(plain.manifest, {**plain.engines, graphs.ACTION_HEAD: head}, plain.tokenizer, **options)


def test_with_an_envelope_it_is_a_hold_that_is_repeated_and_flown_on_from(policy, head, frames, flown):
    with (
        BackgroundServer(policy, envelope=EnvelopeConfig()) as server,
        SessionClient(server.url, frame_format="rgb8") as client,
    ):
        client.start(PROMPT, seed=1)
        first = client.observe(frames[:1])
        head.is_broken = True
        held = client.observe(frames[1:5])
        head.is_broken = False
        again = client.observe([], segment=1)
        last = client.observe(frames[5:9])
    for answer in (held, again):
        assert (answer.segment, answer.hold, answer.frames, answer.need) == (1, "nonfinite", 5, 4)
        assert answer.actions.shape == (4, 6)
        assert not answer.actions.any()
    assert (first.hold, last.hold, last.segment, last.done) == (None, None, 2, True)
    np.testing.assert_allclose([first.actions, last.actions], [flown[0], flown[2]], atol=MOTION_TOLERANCE)


def test_without_an_envelope_it_is_an_error_and_the_segment_is_asked_for_again(policy, head, frames, flown):
    with BackgroundServer(policy) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(PROMPT, seed=1)
        client.observe(frames[:1])
        head.is_broken = True
        for sent in (frames[1:5], []):
            with pytest.raises(ServerError) as refusal:
                client.observe(sent)
            assert (refusal.value.code, refusal.value.frames) == ("nonfinite_actions", 5)
        head.is_broken = False
        answer = client.observe([], segment=1)
    assert (answer.segment, answer.hold) == (1, None)
    np.testing.assert_allclose(answer.actions, flown[1], atol=MOTION_TOLERANCE)


def test_a_model_that_gives_nothing_else_holds_to_the_end(policy, head, frames):
    head.is_broken = True
    with (
        BackgroundServer(policy, envelope=EnvelopeConfig(), warm_up=False) as server,
        SessionClient(server.url, frame_format="rgb8") as client,
    ):
        client.start(PROMPT, seed=1)
        answers = [client.observe(frames[sent:point]) for sent, point in ((0, 1), (1, 5), (5, 9))]
        assert [answer.hold for answer in answers] == ["nonfinite"] * 3
        assert [answer.done for answer in answers] == [False, False, True]
        assert answers[0].profile == "exact"


def test_a_hold_survives_a_restart(policy, head, frames, flown, tmp_path):
    options = {"envelope": EnvelopeConfig(), "warm_up": False}
    with (
        BackgroundServer(policy, journal=SessionJournal(tmp_path), **options) as server,
        SessionClient(server.url, frame_format="rgb8") as client,
    ):
        client.start(PROMPT, seed=1)
        client.observe(frames[:1])
        head.is_broken = True
        client.observe(frames[1:5])
        name = client.session
    head.is_broken = False
    with (
        BackgroundServer(policy, journal=SessionJournal(tmp_path), **options) as server,
        SessionClient(server.url, frame_format="rgb8") as client,
    ):
        client.start(session=name, resume=True)
        assert client.observe([], segment=1).hold == "nonfinite"
        np.testing.assert_allclose(client.observe(frames[5:9]).actions, flown[2], atol=MOTION_TOLERANCE)


def test_http_client_is_held_too_and_repeats_its_call(policy, head):
    with BackgroundServer(policy, envelope=EnvelopeConfig()) as server, HttpCalls(server) as calls:
        head.is_broken = True
        call = {"instruction": PROMPT, "allow_future_segments": True, "first_frame": 1}
        held = calls.fly([frame(), frame()], **call)
        head.is_broken = False
        again = calls.fly([frame(), frame()], **call)
    assert (held["segment_index"], held["hold"], held["actions"]) == (0, "nonfinite", [[0.0] * 6] * 4)
    assert {**again, "timing": None} == {**held, "timing": None}


def test_a_segment_passed_over_leaves_no_guess_to_go_on_from(plain, head, frames, flown):
    policy = breakable(plain, head, speculation=SpeculationConfig(threshold=0.0))
    session = policy.new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    head.is_broken = True
    with pytest.raises(NonFiniteActionsError, match="segment 1") as refusal:
        session.observe(frames[1:5])
    session.pass_over()
    head.is_broken = False
    assert (session.emitted, session.need, refusal.value.chunk.segment) == (1, 4, 1)
    assert not session.work_ahead()
    np.testing.assert_allclose(session.observe(frames[5:9]).actions, flown[2], atol=MOTION_TOLERANCE)
    assert session.speculated.accepted == 0


def test_a_guess_that_is_not_finite_is_dropped(plain, head, frames, flown):
    policy = breakable(plain, head, speculation=SpeculationConfig(threshold=0.0))
    session = policy.new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    head.is_broken = True
    assert not session.work_ahead()
    head.is_broken = False
    chunk = session.observe(frames[1:5])
    assert not chunk.was_ready
    np.testing.assert_array_equal(chunk.actions, flown[1])


def test_what_is_passed_over_last_frees_the_flight(plain, head, frames):
    session = breakable(plain, head).new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    session.observe(frames[1:5])
    head.is_broken = True
    with pytest.raises(NonFiniteActionsError):
        session.observe(frames[5:9])
    assert session.kv_bytes > 0
    session.pass_over()
    assert session.done
    assert session.kv_bytes == 0
    with pytest.raises(ValueError, match="all are emitted"):
        session.pass_over()


def test_nothing_is_passed_over_that_is_not_due(plain, frames):
    session = plain.new_session(PROMPT, seed=1)
    with pytest.raises(ValueError, match="frames missing: 1"):
        session.pass_over()
    session.observe(frames[:1])
    with pytest.raises(ValueError, match="frames missing: 4"):
        session.pass_over()


def test_a_chained_flight_counts_its_own_segments(plain, head, frames):
    session = ChainedSession(breakable(plain, head), PROMPT, horizons=2, seed=1)
    for part in (frames[:1], frames[1:5], frames[5:9]):
        session.observe(part)
    head.is_broken = True
    with pytest.raises(NonFiniteActionsError) as refusal:
        session.observe(frames[9:13])
    assert (refusal.value.chunk.segment, refusal.value.chunk.observed_frames) == (3, 13)
    session.pass_over()
    assert (session.emitted, session.need) == (3, 4)
    head.is_broken = False
    assert session.observe(frames[1:5]).segment == 4


def test_a_policy_that_raises_is_held_like_one_that_answers_with_nan():
    class BrokenPolicy(RememberingPolicy):
        def new_session(self, *args, **options):
            session = super().new_session(*args, **options)
            session.fail_with = nonfinite()
            return session

    picture = np.zeros((4, 4, 3), np.uint8)
    for envelope, hold in ((EnvelopeConfig(), "nonfinite"), (EnvelopeConfig(age_s=1e-6), "stale")):
        with BackgroundServer(BrokenPolicy(), envelope=envelope) as server, SessionClient(server.url) as client:
            client.start("go")
            answer = client.observe([picture])
            assert (answer.segment, answer.hold) == (0, hold)
            assert client.observe([], segment=0).hold == hold


def test_null_policy_passes_over_what_is_due_only():
    session = NullPolicy().new_session("go")
    with pytest.raises(ValueError, match="frames missing: 1"):
        session.pass_over()
    session.frames = 1
    session.pass_over()
    assert session.emitted == 0
