"""Keys and values of instructions that were flown before: a session with the same words starts without the text pass.

Source: spec/world_model.md 9.1 f (text features depend on the prompt alone).
"""

from __future__ import annotations

from collections import OrderedDict

from worldvln_edge.runtime.worldvln.kv_cache import KVEntries


class TextCache:
    """Least recently used prompts go first once the cache holds more than it may."""

    def __init__(self, max_bytes: int = 256 << 20):
        """
        Args:
            max_bytes: of keys and values; 0 keeps nothing.
        """
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[tuple[str, str], KVEntries] = OrderedDict()

    def get(self, prompt: str, negative_prompt: str) -> KVEntries | None:
        """What was put under these words; shared, never changed."""
        entries = self._entries.get((prompt, negative_prompt))
        if entries is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end((prompt, negative_prompt))
        return entries

    def put(self, prompt: str, negative_prompt: str, entries: KVEntries) -> None:
        """Remember a prompt; one that is larger than the whole cache is not kept."""
        if entries.size_bytes > self.max_bytes:
            return
        replaced = self._entries.pop((prompt, negative_prompt), None)
        if replaced is not None:
            self.size_bytes -= replaced.size_bytes
        self._entries[prompt, negative_prompt] = entries
        self.size_bytes += entries.size_bytes
        while self.size_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= oldest.size_bytes
