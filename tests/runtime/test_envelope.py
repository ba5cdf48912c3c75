"""What is late, stale, not finite or too fast is never flown, and the reason is said."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from worldvln_edge.client import SessionClient
from worldvln_edge.config import ConfigError, HorizonConfig
from worldvln_edge.protocol import Actions, Observe, Start
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.envelope import Envelope, EnvelopeConfig, read_envelope
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager

FPS = 4
NOTHING = np.zeros((0, 6), np.float32)


def chunk_of(actions: np.ndarray) -> ActionChunk:
    return ActionChunk(segment=1, actions=actions, observed_frames=17, seed=0)


def reason(config: EnvelopeConfig, actions, before=NOTHING, age_s=0.0, late_s=None):
    return Envelope(config, fps=FPS).reason(np.asarray(actions), flown_before=before, age_s=age_s, late_s=late_s)


def steps(count: int, *, cm: float = 0.0, deg: float = 0.0) -> np.ndarray:
    actions = np.zeros((count, 6), np.float32)
    actions[:, 0], actions[:, 4] = cm, deg
    return actions


@pytest.mark.parametrize(
    ("config", "actions", "options", "expected"),
    [
        ({}, steps(4, cm=900, deg=90), {}, None),
        ({}, steps(4), {"late_s": 0.1}, "late"),
        ({"hold_late": False}, steps(4), {"late_s": 0.1}, None),
        ({"age_s": 1.0}, steps(4), {"age_s": 1.1}, "stale"),
        ({"age_s": 1.0}, steps(4), {"age_s": 0.9}, None),
        ({}, np.full((4, 6), np.nan, np.float32), {}, "nonfinite"),
        ({"step_cm": 10}, steps(4, cm=-10.1), {}, "step_translation"),
        ({"step_cm": 10}, steps(4, cm=10), {}, None),
        ({"step_deg": 5}, steps(4, deg=-5.1), {}, "step_rotation"),
        ({"second_cm": 30}, steps(4, cm=7.6), {}, "speed"),
        ({"second_cm": 31}, steps(4, cm=7.6), {}, None),
        ({"second_deg": 30}, steps(4, deg=7.6), {}, "turn_rate"),
        ({"second_cm": 30}, steps(3, cm=7.6), {"before": steps(4, cm=7.6)}, "speed"),
        ({"second_cm": 30}, steps(3, cm=7.6), {"before": steps(4)}, None),
    ],
)
def test_reasons(config, actions, options, expected):
    assert reason(EnvelopeConfig(**config), actions, **options) == expected


def test_what_was_flown_too_fast_before_does_not_hold_what_comes_a_second_later():
    before = np.concatenate([steps(4, cm=100), steps(3)])
    assert reason(EnvelopeConfig(second_cm=30), steps(4, cm=7), before=before) is None


@given(
    actions=arrays(np.float32, (8, 6), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    before=arrays(np.float32, st.tuples(st.integers(0, 8), st.just(6)), elements=st.floats(-50, 50, width=32)),
    limits=st.tuples(*[st.floats(1, 100)] * 4),
    age_s=st.floats(0, 5),
    is_late=st.booleans(),
)
def test_whatever_passes_is_within_every_limit(actions, before, limits, age_s, is_late):
    step_cm, step_deg, second_cm, second_deg = limits
    config = EnvelopeConfig(step_cm=step_cm, step_deg=step_deg, second_cm=second_cm, second_deg=second_deg, age_s=2.0)
    chunk = chunk_of(actions)
    late_s = 0.1 if is_late else None
    answer = Envelope(config, fps=FPS).apply(chunk, flown_before=before, age_s=age_s, late_s=late_s)
    assert np.isfinite(answer.actions).all()
    if answer.hold is not None:
        assert not answer.actions.any()
        assert (answer.segment, answer.seed) == (chunk.segment, chunk.seed)
        return
    assert answer is chunk
    assert not is_late
    assert age_s <= 2.0
    flown = np.concatenate([before, actions]).astype(float)
    for end in range(len(before) + 1, len(flown) + 1):
        second = flown[max(0, end - FPS) : end]
        assert sum(np.hypot(np.hypot(x, y), z) for x, y, z, *_ in second) <= second_cm * (1 + 1e-9) + 1e-9
        assert sum(max(abs(angle) for angle in step[3:]) for step in second) <= second_deg * (1 + 1e-9) + 1e-9
    for step in actions.astype(float):
        assert np.linalg.norm(step[:3]) <= step_cm
        assert np.abs(step[3:]).max() <= step_deg


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_limits_are_positive(value):
    with pytest.raises(ConfigError, match="envelope: step_cm must be above 0"):
        EnvelopeConfig(step_cm=value)


def test_file_gives_the_limits(tmp_path):
    path = tmp_path / "envelope.json"
    path.write_text('{"step_cm": 40, "hold_late": false}')
    assert read_envelope(path) == EnvelopeConfig(step_cm=40.0, hold_late=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"speed": 3}', "unknown field 'speed'"),
        ('{"step_cm": "fast"}', "step_cm"),
        ('{"step_cm": -1}', "above 0"),
        ("[1]", "object"),
        ("{", "docs/operations.md"),
    ],
)
def test_broken_file_is_refused(tmp_path, text, message):
    path = tmp_path / "envelope.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_envelope(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        read_envelope(tmp_path / "none.json")


class FastSession(NullSession):
    def observe(self, frames, **options):
        chunk = super().observe(frames, **options)
        return chunk and replace(chunk, actions=chunk.actions + np.float32(100 if chunk.segment == 1 else 1))


class FastPolicy(NullPolicy):
    """One centimetre a step and axis; a hundred in segment 1."""

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return FastSession(self, prompt, seed=seed, emit=emit)


def test_server_answers_a_hold_with_its_reason_and_repeats_it():
    with (
        BackgroundServer(FastPolicy(), envelope=EnvelopeConfig(step_cm=50)) as server,
        SessionClient(server.url) as client,
    ):
        client.start("go")
        frame = np.zeros((4, 4, 3), np.uint8)
        answers = [client.observe([frame] * count) for count in (1, 16, 16)]
        assert [answer.hold for answer in answers] == [None, "step_translation", None]
        assert [bool(answer.actions.any()) for answer in answers] == [True, False, True]
        again = client.observe([], segment=1)
        assert (again.hold, again.actions.any()) == ("step_translation", False)


def test_late_actions_are_held():
    with (
        BackgroundServer(NullPolicy(infer_s=1.0), envelope=EnvelopeConfig()) as server,
        SessionClient(server.url) as client,
    ):
        client.start("go")
        answer = client.observe([np.zeros((4, 4, 3), np.uint8)], deadline_ms=800)
        assert (answer.hold, answer.is_late) == ("late", True)


class SteadySession(NullSession):
    """Ten centimetres a step."""

    def observe(self, frames, **options):
        chunk = super().observe(frames, **options)
        return chunk and replace(chunk, actions=steps(len(chunk.actions), cm=10))


class SteadyPolicy(NullPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return SteadySession(self, prompt, seed=seed, emit=emit)


def test_a_second_may_be_longer_than_the_segment_before():
    policy = SteadyPolicy(HorizonConfig(num_frames=9, step=2, fps=8))
    with (
        BackgroundServer(policy, envelope=EnvelopeConfig(second_cm=45)) as server,
        SessionClient(server.url) as client,
    ):
        client.start("go")
        frame = np.zeros((4, 4, 3), np.uint8)
        holds = [client.observe([frame] * count).hold for count in (1, 2, 2)]
    assert holds == [None, None, "speed"]  # the third ends a second in which 60 cm would be flown, 40 of them before


def test_age_counts_from_arrival_and_not_from_the_end_of_the_wait():
    def observe(first: int, count: int) -> Observe:
        pixels = [np.zeros((4, 4, 3), np.uint8).tobytes()] * count
        return Observe(id=first, session="s", first=first, frames=pixels, fmt="rgb8", w=4, h=4)

    async def fly() -> Actions:
        manager = SessionManager(NullPolicy(infer_s=0.5), envelope=EnvelopeConfig(age_s=0.9))
        await manager.start("", Start(id=0, session="s", prompt="go"))
        _, second = await asyncio.gather(*(manager.observe("", observe(*call)) for call in ((1, 1), (2, 16))))
        manager.close()
        return second

    second = asyncio.run(fly())
    assert (second.seg, second.hold) == (1, "stale")  # half a second behind the first segment, half for its own


def test_a_drone_that_was_held_has_not_arrived(tmp_path):
    frame = np.zeros((4, 4, 3), np.uint8)

    def fly(start: dict, calls: tuple[int, ...]) -> tuple[list[bool], str]:
        journal = SessionJournal(tmp_path)
        with (
            BackgroundServer(SteadyPolicy(), envelope=EnvelopeConfig(step_cm=5), journal=journal) as server,
            SessionClient(server.url) as client,
        ):
            client.start(**start, prompt="go")
            answers = [client.observe([frame] * count) for count in calls]
            assert [answer.hold for answer in answers] == ["step_translation"] * len(calls)
            return [answer.is_settled for answer in answers], client.session

    settled, name = fly({"chain": True}, (1, 16))
    assert settled == [False, False]
    assert fly({"session": name, "resume": True}, (16,))[0] == [False]
