"""The cache's visible prefix is what was asked for, whatever was stored and dropped before."""

import weakref

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from worldvln_edge.runtime.worldvln.kv_cache import TEXT, HostKVMemory, KVCache, KVCapacityError, KVShape, KVWorkspace

LAYERS, ROWS, HEADS, CAPACITY, WIDTH = 2, 2, 1, 40, 3


def new_workspace() -> KVWorkspace:
    return KVWorkspace(
        HostKVMemory(
            KVShape(
                layers=LAYERS, rows=ROWS, kv_heads=HEADS, capacity=CAPACITY, head_dim=WIDTH, dtype=np.dtype(np.float32)
            )
        )
    )


def new_cache() -> KVCache:
    return KVCache(new_workspace())


def array(cache: KVCache) -> np.ndarray:
    return cache.workspace.memory.array


def write(cache: KVCache, tokens: int, value: float) -> None:
    """What a graph does: entries behind the visible prefix."""
    array(cache)[..., cache.length : cache.length + tokens, :] = value


class CacheMachine(RuleBasedStateMachine):
    """Oracle: a dictionary of arrays, concatenated in the order asked for."""

    def __init__(self):
        super().__init__()
        self.cache = new_cache()
        self.stored: dict = {}
        self.counter = 0.0

    @initialize(tokens=st.integers(1, 4))
    def text(self, tokens: int):
        self._keep(TEXT, tokens)

    def _keep(self, key, tokens: int) -> None:
        self.counter += 1
        write(self.cache, tokens, self.counter)
        self.cache.keep(key, tokens, ROWS)
        self.stored[key] = (tokens, self.counter)

    @rule(data=st.data())
    def show(self, data):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.stored, key=str)), unique=True))
        self._check_show(keys)

    def _check_show(self, keys) -> None:
        if sum(self.stored[key][0] for key in keys) > CAPACITY:
            return
        self.cache.show(keys)
        expected = [self.stored[key][1] for key in keys for _ in range(self.stored[key][0])]
        assert self.cache.length == len(expected)
        visible = array(self.cache)[..., : self.cache.length, :]
        np.testing.assert_array_equal(visible, np.broadcast_to(np.array(expected)[:, None], visible.shape))

    @rule(data=st.data(), tokens=st.integers(1, 4), clip=st.integers(0, 3), scale=st.integers(0, 2))
    def run_a_step(self, data, tokens: int, clip: int, scale: int):
        """A step sees some references, writes behind them, and is kept, perhaps in the place of an earlier one."""
        others = [key for key in sorted(self.stored, key=str) if key != (clip, scale)]
        keys = data.draw(st.lists(st.sampled_from(others), unique=True))
        if sum(self.stored[key][0] for key in keys) + tokens > CAPACITY:
            return
        self._check_show(keys)
        self._keep((clip, scale), tokens)

    @rule()
    def write_without_keeping(self):
        write(self.cache, min(3, CAPACITY - self.cache.length), -1.0)

    @precondition(lambda self: len(self.stored) > 1)
    @rule(data=st.data())
    def drop(self, data):
        kept = data.draw(st.lists(st.sampled_from(sorted(self.stored, key=str)), unique=True))
        kept = list({TEXT, *kept})
        self.cache.drop_except(kept)
        self.stored = {key: value for key, value in self.stored.items() if key in kept}
        assert set(self.cache.stored_keys) == set(kept)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_more_entries_than_the_bundle_has_room_for_are_refused():
    cache = new_cache()
    write(cache, 30, 1)
    cache.keep(TEXT, 30, ROWS)
    cache.show([TEXT])
    with pytest.raises(KVCapacityError, match="holds 40 entries, 41 are needed"):
        cache.workspace.check_room(41)
    cache.show([])
    write(cache, 30, 2)
    cache.keep((0, 1), 30, ROWS)
    with pytest.raises(KVCapacityError, match="60 are needed; export it again"):
        cache.show([TEXT, (0, 1)])


def test_an_entry_kept_twice_is_the_later_one():
    cache = new_cache()
    for value in (1, 2):
        cache.show([])
        write(cache, 2, value)
        cache.keep((0, 0), 2, ROWS)
    cache.show([])
    cache.show([(0, 0)])
    assert (array(cache)[..., :2, :] == 2).all()


def test_cleared_cache_holds_nothing():
    cache = new_cache()
    write(cache, 5, 1)
    cache.keep(TEXT, 5, ROWS)
    assert cache.size_bytes == LAYERS * 2 * ROWS * HEADS * 5 * WIDTH * 4
    cache.clear()
    assert (cache.length, cache.stored_keys, cache.size_bytes) == (0, (), 0)


def test_sessions_that_share_the_buffers_see_their_own_entries():
    workspace = new_workspace()
    one, two = KVCache(workspace), KVCache(workspace)
    for cache, value in ((one, 1), (two, 2)):
        cache.show([])
        write(cache, 3, value)
        cache.keep(TEXT, 3, ROWS)
    for _ in range(2):
        for cache, value in ((one, 1), (two, 2)):
            cache.show([TEXT])
            assert (array(cache)[..., : cache.length, :] == value).all()


def test_entries_that_stand_already_are_not_copied():
    cache = new_cache()
    for key, value in ((TEXT, 1), ((0, 0), 2)):
        cache.show(cache.stored_keys)
        write(cache, 2, value)
        cache.keep(key, 2, ROWS)
    array(cache)[..., :2, :] = 7  # shows up below only if the text was not written again
    cache.show([TEXT])
    cache.show([TEXT, (0, 0)])
    assert (array(cache)[..., :2, :] == 7).all()
    assert (array(cache)[..., 2:4, :] == 2).all()


def test_entries_of_a_session_that_is_gone_are_freed():
    workspace = new_workspace()
    cache = KVCache(workspace)
    cache.show([])
    write(cache, 3, 1)
    entry = weakref.ref(cache.keep(TEXT, 3, ROWS))
    del cache
    assert entry() is None


def test_text_of_another_session_is_taken_over():
    workspace = new_workspace()
    one, two = KVCache(workspace), KVCache(workspace)
    one.show([])
    write(one, 3, 5)
    two.put(TEXT, one.keep(TEXT, 3, ROWS))
    one.show([])
    write(one, 3, 6)
    two.show([TEXT])
    assert (array(two)[..., :3, :] == 5).all()


def test_entries_of_one_guidance_row_leave_the_other_row_alone():
    cache = new_cache()
    cache.show([])
    write(cache, 3, 1)
    cache.keep((0, 0), 3, 1)
    assert cache.holds((0, 0))
    assert not cache.holds((0, 0), ROWS)
    cache.show([])
    write(cache, 3, 2)
    cache.show([(0, 0)])
    assert (array(cache)[:, :, 0, :, :3] == 1).all()
    assert (array(cache)[:, :, 1, :, :3] == 2).all()
