"""How much memory a server gives to its sessions and to frames that wait, so that it refuses instead of running out.

Unless it is told, a server plans with the memory that is available when it starts, after its weights were loaded: half
of it for sessions, an eighth for frames; the rest is for activations, cached texts and other programs.
"""

from __future__ import annotations

from dataclasses import dataclass

from worldvln_edge.protocol import Limits

_SESSIONS_SHARE, _FRAMES_SHARE = 1 / 2, 1 / 8


class MemoryBudgetError(ValueError):
    """Not even one session fits. The message says what it needs, what is there, and what to do."""


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Bytes."""

    session_bytes: int
    """One session at most; 0: sessions hold nothing worth counting."""
    sessions_bytes: int | None
    """All sessions together; None: not bounded, because nothing tells what is available."""
    frames_bytes: int
    """Decoded frames that wait, over all sessions."""


def plan_budget(
    session_bytes: int, limits: Limits, *, available_bytes: int | None, asked_bytes: int | None = None
) -> MemoryBudget:
    """Share out the memory.

    Args:
        session_bytes: what one session holds at most.
        limits: its `max_stored_bytes` is the most for frames.
        available_bytes: where sessions live; None where nothing tells.
        asked_bytes: for sessions, as the operator wants it; None: half of what is available, or one session's if that
            is more.

    Raises:
        MemoryBudgetError: one session does not fit.
    """
    frames_bytes = limits.max_stored_bytes
    if available_bytes is not None:
        frames_bytes = min(frames_bytes, int(available_bytes * _FRAMES_SHARE))
    sessions_bytes = asked_bytes
    if asked_bytes is None and available_bytes is not None:
        if session_bytes > available_bytes:
            raise MemoryBudgetError(
                f"a session of this model holds up to {in_units(session_bytes)}, and {in_units(available_bytes)} are "
                "available here; free memory, fly a smaller model or a lower precision, or name the memory that "
                "sessions may use (--session-memory-mb)"
            )
        sessions_bytes = max(int(available_bytes * _SESSIONS_SHARE), session_bytes)
    if sessions_bytes is not None and session_bytes > sessions_bytes:
        raise MemoryBudgetError(
            f"a session of this model holds up to {in_units(session_bytes)}, and sessions may use "
            f"{in_units(sessions_bytes)}; allow more (--session-memory-mb)"
        )
    return MemoryBudget(session_bytes=session_bytes, sessions_bytes=sessions_bytes, frames_bytes=frames_bytes)


def in_units(size_bytes: int) -> str:
    """`2.80 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes / 1e3:.1f} kB"
