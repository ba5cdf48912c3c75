"""A chained flight is a row of ordinary ones, each starting at the last frame of the one before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.sessions.chained_session import ChainedSession, SettledRule, chained_horizon
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.policy import StoppedError

HORIZON = HorizonConfig(num_frames=9, step=4, fps=4)


class SeeingSession(NullSession):
    """Remembers the number that each of its frames shows."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen: list[int] = []
        self.is_closed = False

    def observe(self, frames, **options):
        before = self.frames
        chunk = None
        try:
            chunk = super().observe(frames, **options)
        finally:
            self.seen += [256 * int(frame[0, 0, 0]) + int(frame[0, 0, 1]) for frame in frames[: self.frames - before]]
        return chunk

    def close(self):
        self.is_closed = True


class SeeingPolicy(NullPolicy):
    def __init__(self, **options):
        super().__init__(HORIZON, **options)
        self.opened: list[SeeingSession] = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened.append(SeeingSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt))
        return self.opened[-1]


def picture(index: int) -> np.ndarray:
    return np.full((2, 2, 3), (*divmod(index, 256), 0), np.uint8)


def fly(session: ChainedSession, calls: list[int]) -> list[tuple[int, int]]:
    """(segment, frames) of everything that was emitted; frames that were not taken are sent again, as a server does."""
    waiting: list[np.ndarray] = []
    sent, emitted = 0, []
    for count in calls:
        waiting += [picture(sent + 1 + index) for index in range(count)]
        sent += count
        while True:
            before = session.frames
            chunk = session.observe(tuple(waiting))
            del waiting[: session.frames - before]
            if chunk is not None:
                emitted.append((chunk.segment, chunk.observed_frames))
            elif session.frames == before:
                break
    return emitted


@pytest.mark.parametrize("emit", ["ahead", "behind"])
@given(calls=st.lists(st.integers(0, 30), max_size=12), horizons=st.integers(1, 4))
def test_however_frames_come_every_horizon_sees_its_own(emit, calls, horizons):
    policy = SeeingPolicy()
    session = ChainedSession(policy, "go", horizons=horizons, emit=emit)
    emitted = fly(session, calls)
    whole = chained_horizon(HORIZON, horizons)
    frames = min(sum(calls), whole.num_frames)
    assert session.frames == frames
    ready = whole.points[:-1] if emit == "ahead" else whole.points[1:]
    assert [segment for segment, _ in emitted] == [s for s, point in enumerate(ready) if frames >= point]
    assert all(at >= ready[segment] for segment, at in emitted)
    assert session.done == (len(emitted) == whole.segments)
    assert session.need == (0 if session.done else ready[len(emitted)] - frames)
    for index, opened in enumerate(policy.opened):
        first = 1 + index * (HORIZON.num_frames - 1)
        assert opened.seen == list(range(first, min(first + HORIZON.num_frames, frames + 1)))
        assert opened.is_closed == (index + 1 < len(policy.opened))


def test_settings_hold_for_every_horizon_still_to_come():
    policy = SeeingPolicy()
    session = ChainedSession(policy, "go", horizons=3, seed=4, negative_prompt="slow")
    fly(session, [9])
    session.set_prompt("turn")
    session.set_negative_prompt("fast")
    session.set_seed(5)
    fly(session, [8])
    found = [(one.prompt, one.negative_prompt, one._seed) for one in policy.opened]
    assert found == [("go", "slow", 4), ("turn", "fast", 5), ("turn", "fast", 5)]


def test_a_stopped_first_segment_of_a_horizon_can_be_asked_for_again():
    policy = SeeingPolicy()
    session = ChainedSession(policy, "go", horizons=2)
    fly(session, [5])
    policy.infer_s = 5.0
    with pytest.raises(StoppedError):
        session.observe([picture(6 + index) for index in range(4)], should_stop=lambda: True)
    assert (session.frames, session.emitted, session.need) == (9, 1, 0)
    policy.infer_s = 0.0
    chunk = session.observe(())
    assert (chunk.segment, chunk.observed_frames) == (2, 9)


@pytest.mark.parametrize("emit", ["ahead", "behind"])
def test_an_engine_that_fails_at_the_border_of_horizons_loses_no_frame(emit):
    policy = SeeingPolicy()
    session = ChainedSession(policy, "go", horizons=3, emit=emit)
    for _ in range(2):
        session.observe([picture(session.frames + 1 + index) for index in range(9 - session.frames)])
    assert (session.frames, session.emitted) == (9, 1)  # full, and the next horizon has not begun

    def fails(*args, **options):
        raise RuntimeError("out of memory")

    following = [picture(10), picture(11)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullSession, "observe", fails)
        with pytest.raises(RuntimeError):
            session.observe(following)
    assert (session.frames, session.emitted) == (9, 1)
    assert session.need == (0 if emit == "ahead" else 4)
    session.observe(following)
    assert session.frames == 11
    assert [one.seen for one in policy.opened] == [list(range(1, 10)), [9, 10, 11]]


def actions(*sizes: float) -> np.ndarray:
    found = np.zeros((len(sizes), 6))
    found[:, 1] = sizes
    return found


@pytest.mark.parametrize(
    ("before", "sizes", "expected"),
    [(0, (), 0), (3, (), 3), (3, (0, 2.9), 5), (3, (3.0, 0, 0), 2), (9, (0, 0, 5), 0), (0, (5, 0), 1)],
)
def test_steps_without_motion_are_counted_from_the_last_that_moved(before, sizes, expected):
    assert SettledRule().still_steps(before, actions(*sizes)) == expected


def test_turning_is_motion_too():
    turn = np.zeros((3, 6))
    turn[1, 4] = -1.0
    assert SettledRule().still_steps(8, turn) == 1


@pytest.mark.parametrize("emit", ["ahead", "behind"])
@given(cut=st.integers(0, 33), horizons=st.integers(1, 4))
def test_a_restored_flight_goes_on_where_it_was(emit, cut, horizons):
    policy = SeeingPolicy()
    flown = ChainedSession(policy, "go", horizons=horizons, emit=emit)
    fly(flown, [1] * cut)
    restored = ChainedSession(policy, "go", horizons=horizons, emit=emit)
    restored.restore([picture(1 + index) for index in range(flown.frames)], flown.emitted)
    assert (restored.frames, restored.emitted, restored.need) == (flown.frames, flown.emitted, flown.need)
    for index in range(flown.frames + 1, 35):
        ours, theirs = (session.observe([picture(index)]) for session in (restored, flown))
        assert (ours and ours.segment) == (theirs and theirs.segment)
        assert (restored.frames, restored.done) == (flown.frames, flown.done)


def test_only_a_new_session_is_restored():
    session = ChainedSession(SeeingPolicy(), "go", horizons=2)
    fly(session, [1])
    with pytest.raises(ValueError, match="only a new session"):
        session.restore([picture(1)], 0)
