"""Prompts that were flown before are remembered, the least recently used go first, and memory is bounded."""

import numpy as np

from worldvln_edge.runtime.worldvln.kv_cache import KVEntries
from worldvln_edge.runtime.worldvln.text_cache import TextCache


def entries(kilobytes: int = 1) -> KVEntries:
    return KVEntries(tokens=1, rows=1, data=np.zeros(kilobytes * 1024, np.uint8))


def test_least_recently_used_prompt_goes_first():
    cache = TextCache(max_bytes=2048)
    one, two, three = entries(), entries(), entries()
    cache.put("one", "", one)
    cache.put("two", "", two)
    assert cache.get("one", "") is one
    cache.put("three", "", three)
    assert (cache.get("one", ""), cache.get("two", ""), cache.get("three", "")) == (one, None, three)
    assert cache.size_bytes == 2048


def test_negative_prompt_is_part_of_the_words():
    cache = TextCache()
    cache.put("fly", "back", entries())
    assert cache.get("fly", "") is None
    assert (cache.hits, cache.misses) == (0, 1)


def test_prompt_put_twice_counts_once():
    cache = TextCache()
    cache.put("fly", "", entries(2))
    later = entries(3)
    cache.put("fly", "", later)
    assert cache.get("fly", "") is later
    assert cache.size_bytes == 3 * 1024


def test_prompt_larger_than_the_cache_is_not_kept_and_drives_nobody_out():
    cache = TextCache(max_bytes=2048)
    cache.put("fly", "", entries())
    cache.put("a long story", "", entries(4))
    assert cache.get("a long story", "") is None
    assert cache.get("fly", "") is not None
