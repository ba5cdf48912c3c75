"""KV cache: the buffers that the graphs bind, and what each session stored to be put there.

The graphs write at an index and attend to the first `length` entries; everything else is bookkeeping on the host.
RoPE is applied before caching, so entries may be stored, dropped and put back anywhere. The buffers are as long as the
longest step needs and belong to the policy, because sessions run one at a time; a session holds only what later clips
refer to.

Legend: layers, 2 = keys and values, B guidance rows, kv heads, capacity entries, hd head size.
Source: spec/world_model.md 3.3, 6.1, 9.2.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

TEXT = "text"
Key = str | tuple[int, int]  # TEXT, or (clip, scale)


class KVCapacityError(RuntimeError):
    """More entries than the exported cache holds."""


class KVMemory(Protocol):
    """Where keys and values live: host memory, or a device's."""

    capacity: int
    rows: int

    def buffers(self, rows: int) -> list[Any]:
        """What an engine binds for a call of `rows` guidance rows, in the order of `graphs.cache_stems`.

        [rows, kv_heads, capacity, hd] each: the first rows of one and the same memory.
        """
        ...

    def read(self, start: int, entries: int, rows: int) -> Any:
        """A copy of entries start..start+entries of the first rows of every buffer; has `nbytes`."""
        ...

    def write(self, start: int, entries: int, rows: int, data: Any) -> None:
        """Put back what `read` returned for as many entries and rows, at any start."""
        ...


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """Sizes of a bundle's caches."""

    layers: int
    rows: int
    kv_heads: int
    capacity: int
    head_dim: int
    dtype: np.dtype


class HostKVMemory:
    """Keys and values in numpy arrays."""

    def __init__(self, shape: KVShape):
        self.array = np.zeros(
            (shape.layers, 2, shape.rows, shape.kv_heads, shape.capacity, shape.head_dim), shape.dtype
        )
        self.capacity, self.rows = shape.capacity, shape.rows
        each = self.array.reshape(-1, *self.array.shape[2:])
        self._buffers = {count: [buffer[:count] for buffer in each] for count in range(1, shape.rows + 1)}

    def buffers(self, rows: int) -> list[np.ndarray]:
        return self._buffers[rows]

    def read(self, start: int, entries: int, rows: int) -> np.ndarray:
        return self.array[:, :, :rows, :, start : start + entries].copy()

    def write(self, start: int, entries: int, rows: int, data: np.ndarray) -> None:
        self.array[:, :, :rows, :, start : start + entries] = data


@dataclass(frozen=True, eq=False, kw_only=True)
class KVEntries:
    """Keys and values of the text, or of one scale of an observed clip. Never changed; sessions may share them."""

    tokens: int
    rows: int
    """Guidance rows that were computed; without guidance the first alone."""
    data: Any

    @property
    def size_bytes(self) -> int:
        return int(self.data.nbytes)


class KVWorkspace:
    """The buffers of a policy, and what stands in front in them."""

    def __init__(self, memory: KVMemory):
        self.memory = memory
        # Weak, because a session that is gone must not be kept alive by what it left in the buffers.
        self._standing: list[weakref.ref[KVEntries]] = []

    @property
    def size_bytes(self) -> int:
        return sum(int(buffer.nbytes) for buffer in self.memory.buffers(self.memory.rows))

    def show(self, entries: Sequence[KVEntries]) -> int:
        """Make `entries`, in this order, the visible prefix; what stands there already is not copied.

        Returns:
            Length of the prefix.

        Raises:
            KVCapacityError: they do not fit.
        """
        self.check_room(sum(entry.tokens for entry in entries))
        same = 0
        while same < min(len(entries), len(self._standing)) and self._standing[same]() is entries[same]:
            same += 1
        length = sum(entry.tokens for entry in entries[:same])
        del self._standing[same:]
        for entry in entries[same:]:
            self.memory.write(length, entry.tokens, entry.rows, entry.data)
            self._standing.append(weakref.ref(entry))
            length += entry.tokens
        return length

    def take(self, start: int, tokens: int, rows: int) -> KVEntries:
        """Store what a step wrote behind the visible prefix."""
        entry = KVEntries(tokens=tokens, rows=rows, data=self.memory.read(start, tokens, rows))
        self._standing.append(weakref.ref(entry))
        return entry

    def check_room(self, entries: int) -> None:
        """Raise KVCapacityError if the buffers cannot hold that many entries."""
        if entries > self.memory.capacity:
            raise KVCapacityError(
                f"the bundle's KV cache holds {self.memory.capacity} entries, {entries} are needed; export it again"
            )


class KVCache:
    """What one session stored. `show` comes before every step; `keep` right behind it, if at all."""

    def __init__(self, workspace: KVWorkspace):
        self.workspace = workspace
        self._stored: dict[Key, KVEntries] = {}
        self.length = 0
        """Entries that the next step sees."""

    def branch(self) -> KVCache:
        """A cache that starts with the same stored entries and goes its own way."""
        other = KVCache(self.workspace)
        other._stored = dict(self._stored)
        return other

    def holds(self, key: Key, rows: int = 1) -> bool:
        """Are these entries stored, for that many guidance rows?"""
        return key in self._stored and self._stored[key].rows >= rows

    def clear(self) -> None:
        """Forget everything: another prompt, another flight."""
        self._stored.clear()
        self.length = 0

    def show(self, keys: Sequence[Key]) -> None:
        """Make `keys`, in this order, what the next step sees."""
        self.length = self.workspace.show([self._stored[key] for key in keys])

    def keep(self, key: Key, tokens: int, rows: int) -> KVEntries:
        """Store the entries that the last step wrote behind the visible prefix, and make them visible."""
        entry = self._stored[key] = self.workspace.take(self.length, tokens, rows)
        self.length += tokens
        return entry

    def put(self, key: Key, entries: KVEntries) -> None:
        """Store entries that were computed before, perhaps by another session."""
        self._stored[key] = entries

    def drop_except(self, keys: Sequence[Key]) -> None:
        """Free stored entries that nobody needs any more."""
        wanted = set(keys)
        self._stored = {key: entry for key, entry in self._stored.items() if key in wanted}

    @property
    def held(self) -> tuple[Any, ...]:
        """The data of the stored entries, in the memory where they lie."""
        return tuple(entry.data for entry in self._stored.values())

    @property
    def stored_keys(self) -> tuple[Key, ...]:
        return tuple(self._stored)

    @property
    def size_bytes(self) -> int:
        """Of the stored entries; the workspace is the policy's."""
        return sum(entry.size_bytes for entry in self._stored.values())
