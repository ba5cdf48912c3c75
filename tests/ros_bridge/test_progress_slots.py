"""Frames are due when actions were consumed."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.ros_bridge.progress_slots import ProgressSlots
from worldvln_edge.ros_bridge.setpoints.policy_link import Progress

_MS = 1_000_000
_OFFSET = 10**18
"""Between the clock of the images and the monotonic one."""


def _slots(told: list[int], *, actions: int = 16, begun_ms: int = 1000, after_ns: int = 0) -> ProgressSlots:
    return ProgressSlots(
        7,
        actions,
        after_ns=after_ns,
        begun_ns=begun_ms * _MS,
        expect=told.append,
        to_stamp_ns=lambda at_ns: at_ns + _OFFSET,
    )


def _report(at_ms: float, progress: float, chunk: int | None = 7) -> Progress:
    return Progress(at_ns=int(at_ms * _MS), mode="fly", reason="", chunk=chunk, progress=progress)


def test_at_full_speed_frames_are_due_at_the_models_rate():
    told: list[int] = []
    slots = _slots(told)
    for tick in range(1, 41):
        slots.add(_report(1000 + 25 * tick, 0.4 * tick))
    expected = [_OFFSET + int((1000 + 62.5 * action) * _MS) for action in range(1, 17)]
    assert slots.is_complete
    assert max(abs(slot - due) for slot, due in zip(told, expected, strict=True)) < _MS


@given(steps=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 3)), min_size=1, max_size=60))
def test_slots_are_in_order_and_as_many_as_actions_were_consumed(steps):
    told: list[int] = []
    slots = _slots(told)
    at_ms, progress = 1000, 0.0
    for wait_ms, more in steps:
        at_ms, progress = at_ms + wait_ms, min(progress + more, 16.0)
        slots.add(_report(at_ms, progress))
    assert slots.known == len(told) == int(progress + 1e-9)
    assert all(later > earlier for earlier, later in pairwise(told))
    assert slots.is_complete == (progress + 1e-9 >= 16)


def test_reports_of_other_chunks_and_old_ones_say_nothing():
    told: list[int] = []
    slots = _slots(told)
    slots.add(_report(1100, 5.0, chunk=6))
    slots.add(_report(1100, 5.0, chunk=None))
    slots.add(_report(900, 5.0))
    assert told == []
    slots.add(_report(1100, 2.0))
    slots.add(_report(1200, 1.0))
    assert slots.known == 2


def test_slots_lie_behind_those_of_the_chunk_before_even_if_much_was_flown_at_once():
    told: list[int] = []
    before_ns = _OFFSET + 1090 * _MS
    _slots(told, after_ns=before_ns).add(_report(1100, 8.0))
    assert len(told) == 8
    assert told[0] > before_ns
