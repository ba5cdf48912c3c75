"""What a server needs of a policy family: describe yourself, open sessions, turn observed frames into actions.

WorldVLN is the first family (`worldvln_policy.py`). Servers, recorders and benchmarks depend on these names only.
Source: spec/session_protocol.md 1, 2.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from worldvln_edge.config import HorizonConfig

Emit = Literal["ahead", "behind"]
"""ahead: segment s is ready once its first frame was observed (rule F). behind: once its last one was (rule D)."""


class NonFiniteActionsError(RuntimeError):
    """The model gave NaN or infinity; the segment was not emitted and may be asked for again."""


@dataclass(frozen=True, kw_only=True)
class ActionChunk:
    """The actions of one segment."""

    segment: int
    actions: np.ndarray  # float32 [step, 6], cm and deg, order poses.ACTION_ORDER
    observed_frames: int  # frames that the session held when the chunk was made
    seed: int
    head: Literal["latent", "rgb"] = "latent"
    profile: str = "exact"  # generation profile that was flown
    profile_reason: str = ""  # why, where a deadline decided
    timings_ms: dict[str, float] = field(default_factory=dict)  # stage -> milliseconds


@dataclass(frozen=True, kw_only=True)
class PolicyInfo:
    """What a client may know about a policy."""

    name: str
    precision: str
    backend: str
    device: str
    horizon: HorizonConfig
    image_hw: tuple[int, int]


class PolicySession(Protocol):
    """One trajectory: one prompt, frames 1..num_frames in order. Not thread-safe; one caller at a time."""

    frames: int
    """Frames stored, never above num_frames."""
    emitted: int
    """Last emitted segment, -1 at the start."""

    def observe(self, frames: Sequence[np.ndarray], *, budget_s: float | None = None) -> ActionChunk | None:
        """Store new frames, oldest first, and emit the next segment if it is ready.

        Args:
            frames: uint8 RGB [H, W, 3] each, any size; may be empty; frames past num_frames are dropped.
            budget_s: time until the actions are due; a policy that can do with less work chooses by it.

        Returns:
            The next segment's actions, or None when more frames are needed or all segments were emitted.

        Raises:
            ValueError: a frame is not uint8 [H, W, 3].
            NonFiniteActionsError: the model gave NaN; the frames are kept and the segment stays unemitted.
            Exception: whatever an engine raises. The session stays usable: `frames` tells whether the new frames were
                taken, the segment stays unemitted, and the next call goes on from there.
        """
        ...

    @property
    def least_s(self) -> float | None:
        """Time that the next segment needs at least on this machine; None where that is not known."""
        ...

    def work_ahead(self) -> None:
        """Do now what would otherwise have to be done when the next segment is due; call it while nobody waits.

        It never changes actions, and may be left out. What it raises leaves the session usable, as in `observe`.
        """
        ...

    def set_prompt(self, prompt: str) -> None:
        """Replace the prompt for the segments still to come."""
        ...

    @property
    def need(self) -> int:
        """Frames missing for the next segment; 0 when none are."""
        ...

    @property
    def done(self) -> bool:
        """All segments were emitted."""
        ...

    def close(self) -> None:
        """Free the session's buffers."""
        ...


class Policy(Protocol):
    info: PolicyInfo

    def new_session(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", emit: Emit = "ahead"
    ) -> PolicySession: ...
