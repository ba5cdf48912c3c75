"""KV cache of one session: which keys and values the next step sees, and where its own go.

The graphs write at an index and attend to the first `length` entries; everything else is bookkeeping on the host.
RoPE is applied before caching, so entries may be stored, dropped and put back anywhere.

Legend: layers, 2 = keys and values, B guidance rows, kv heads, capacity entries, hd head size.
Source: spec/world_model.md 3.3, 6.1, 9.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TEXT = "text"
Key = str | tuple[int, int]  # TEXT, or (clip, scale)


class KVCapacityError(RuntimeError):
    """More entries than the exported cache holds."""


class KVCache:
    """Fixed buffers that the engine binds in place, and the stored entries of earlier scales."""

    def __init__(self, *, layers: int, rows: int, kv_heads: int, capacity: int, head_dim: int, dtype: np.dtype):
        self.buffers = np.zeros((layers, 2, rows, kv_heads, capacity, head_dim), dtype)
        self.capacity = capacity
        self._stored: dict[Key, np.ndarray] = {}
        self._shown: list[Key] = []
        self.length = 0

    def clear(self) -> None:
        """Forget everything: another prompt, another flight."""
        self._stored.clear()
        self._shown.clear()
        self.length = 0

    def show(self, keys: Sequence[Key]) -> None:
        """Make `keys`, in this order, the visible prefix of the cache. What already stands there is not copied."""
        same = 0
        while same < min(len(keys), len(self._shown)) and keys[same] == self._shown[same]:
            same += 1
        length = sum(self._stored[key].shape[-2] for key in keys[:same])
        for key in keys[same:]:
            entry = self._stored[key]
            end = length + entry.shape[-2]
            self.check_room(end)
            self.buffers[..., length:end, :] = entry
            length = end
        self._shown = list(keys)
        self.length = length

    def check_room(self, entries: int) -> None:
        """Raise KVCapacityError if the cache cannot hold that many entries."""
        if entries > self.capacity:
            raise KVCapacityError(
                f"the bundle's KV cache holds {self.capacity} entries, {entries} are needed; export it again"
            )

    def keep(self, key: Key, tokens: int) -> None:
        """Store the entries that the last step wrote behind the visible prefix, and make them visible."""
        self._stored[key] = self.buffers[..., self.length : self.length + tokens, :].copy()
        self._shown.append(key)
        self.length += tokens

    def drop_except(self, keys: Sequence[Key]) -> None:
        """Free stored entries that nobody needs any more."""
        wanted = set(keys)
        self._stored = {key: entry for key, entry in self._stored.items() if key in wanted}
        self._shown = self._shown[: next((i for i, k in enumerate(self._shown) if k not in wanted), len(self._shown))]
        self.length = sum(self._stored[key].shape[-2] for key in self._shown)

    @property
    def stored_keys(self) -> tuple[Key, ...]:
        return tuple(self._stored)

    @property
    def size_bytes(self) -> int:
        return self.buffers.nbytes + sum(entry.nbytes for entry in self._stored.values())
