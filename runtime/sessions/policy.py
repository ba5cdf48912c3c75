"""What a server needs of a policy family: describe yourself, open sessions, turn observed frames into actions.

WorldVLN is the first family (`worldvln_policy.py`). Servers, recorders and benchmarks depend on these names only.
Source: spec/session_protocol.md 1, 2.6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from worldvln_edge.config import HorizonConfig
from worldvln_edge.images import check_rgb

Emit = Literal["ahead", "behind"]
"""ahead: segment s is ready once its first frame was observed (rule F). behind: once its last one was (rule D)."""


class StoppedError(RuntimeError):
    """Whoever asked for a segment does not want it any more; it was not emitted and may be asked for again."""


class TooLateError(RuntimeError):
    """The actions cannot be there when they are due; the segment was not emitted and may be asked for again."""

    def __init__(self, needs_s: float):
        super().__init__(f"the segment needs about {needs_s * 1e3:.0f} ms, and less is left")
        self.needs_s = needs_s


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
    was_ready: bool = False  # generated before its frames were there: what it took now tells nothing about the next one
    hold: str | None = None  # why the safety envelope put zero motion in the place of the actions
    timings_ms: dict[str, float] = field(default_factory=dict)  # stage -> milliseconds


class NonFiniteActionsError(RuntimeError):
    """The model gave NaN or infinity; the segment was not emitted and may be asked for again, or passed over."""

    def __init__(self, chunk: ActionChunk):
        super().__init__(f"segment {chunk.segment}: the model gave NaN or infinity")
        self.chunk = chunk
        """What would have been emitted."""


@dataclass(frozen=True, kw_only=True)
class PolicyInfo:
    """What a client may know about a policy."""

    name: str
    precision: str
    backend: str
    device: str
    horizon: HorizonConfig
    image_hw: tuple[int, int]
    weights: str = ""
    """Tells files of weights and graphs apart: another text, other actions."""


class PolicySession(Protocol):
    """One trajectory: one prompt, frames 1..num_frames in order. Not thread-safe; one caller at a time."""

    @property
    def frames(self) -> int:
        """Frames stored, never above num_frames."""
        ...

    @property
    def emitted(self) -> int:
        """Last emitted segment, -1 at the start."""
        ...

    def observe(
        self,
        frames: Sequence[np.ndarray],
        *,
        budget_s: float | None = None,
        should_stop: Callable[[], bool] = ...,
    ) -> ActionChunk | None:
        """Store new frames, oldest first, and emit the next segment if it is ready.

        Args:
            frames: uint8 RGB [H, W, 3] each, any size; may be empty; frames past num_frames are dropped.
            budget_s: time until the actions are due; a policy that can do with less work chooses by it.
            should_stop: asked now and then; when it says True, the segment is given up. Frames are taken all the same.

        Returns:
            The next segment's actions, or None when more frames are needed or all segments were emitted.

        Raises:
            ValueError: a frame is not uint8 [H, W, 3].
            StoppedError: `should_stop` said so.
            TooLateError: the actions cannot be there when they are due, which could not be known before; the frames
                are kept and the segment stays unemitted.
            NonFiniteActionsError: the model gave NaN; the frames are kept and the segment stays unemitted.
            Exception: whatever an engine raises. The session stays usable: `frames` tells whether the new frames were
                taken, the segment stays unemitted, and the next call goes on from there.
        """
        ...

    def restore(self, frames: Sequence[np.ndarray], emitted: int) -> None:
        """Take frames of a flight that was interrupted, and count its segments as emitted without making them again.

        Args:
            frames: all that were stored, oldest first; as for `observe`.
            emitted: last emitted segment, -1 if none was.

        Raises:
            ValueError: the session has frames already, or that segment cannot rest on these frames.
        """
        ...

    def pass_over(self) -> None:
        """Count the next segment as emitted although its actions are not finite: the drone will not move in it.

        Raises:
            ValueError: no segment is due.
        """
        ...

    def least_s(self, new_frames: int = 0, *, with_new_settings: bool = False) -> float | None:
        """Time that the next segment needs at least on this machine; None where that is not known.

        Args:
            new_frames: that it still has to take.
            with_new_settings: a prompt or the seed will be replaced first.
        """
        ...

    def work_ahead(self, should_stop: Callable[[], bool] = ...) -> bool:
        """Do now what would otherwise have to be done when the next segment is due; call it while nobody waits.

        It may be left out. What it raises leaves the session usable, as in `observe`.

        Args:
            should_stop: asked now and then; when it says True, the work is broken off and may be gone on with later.

        Returns:
            Whether there is more to do.
        """
        ...

    def predicted_frames(self, should_stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """What the policy expects to see in the last segment: uint8 RGB [F, H, W, 3]; None where it cannot say.

        Args:
            should_stop: asked between steps; somebody wants the device for a flight.

        Raises:
            StoppedError: `should_stop` said so; asked again, it goes on.
            Exception: whatever an engine raises; the session stays usable.
        """
        ...

    def set_prompt(self, prompt: str) -> None:
        """Replace the prompt for the segments still to come."""
        ...

    def set_negative_prompt(self, negative_prompt: str) -> None:
        """Replace the negative prompt for the segments still to come."""
        ...

    def set_seed(self, seed: int) -> None:
        """Replace the seed for the segments still to come."""
        ...

    def set_profile(self, name: str) -> None:
        """Replace the generation profile for the segments still to come.

        Raises:
            ConfigError: the policy has none of that name.
        """
        ...

    @property
    def need(self) -> int:
        """Frames missing for the next segment; 0 when none are."""
        ...

    @property
    def done(self) -> bool:
        """All segments were emitted."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that the session holds now, shared entries included; never more than `Policy.session_bytes`."""
        ...

    def close(self) -> None:
        """Free the session's buffers."""
        ...


class Policy(Protocol):
    info: PolicyInfo

    @property
    def session_bytes(self) -> int:
        """Memory that one session holds at most; 0 where it is not worth counting."""
        ...

    def available_bytes(self) -> int | None:
        """Memory that is left now where sessions live; None where nothing tells."""
        ...

    def fit_frame(self, frame: np.ndarray) -> np.ndarray:
        """A frame at the size that sessions work with: uint8 RGB [H, W, 3] in and out.

        Called from decoding threads, many at a time. Optional for callers: `observe` takes frames of any size.
        """
        ...

    def new_session(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", emit: Emit = "ahead"
    ) -> PolicySession: ...


def check_due(session: PolicySession) -> None:
    """Raise ValueError unless a segment is due; see `PolicySession.pass_over`."""
    if session.done:
        raise ValueError("no segment is due: all are emitted")
    if session.need:
        raise ValueError(f"no segment is due: frames missing: {session.need}")


def check_restorable(session: PolicySession, frames: Sequence[np.ndarray], emitted: int) -> None:
    """Raise ValueError unless a session that just began may be restored so; see `PolicySession.restore`."""
    if session.frames or session.emitted >= 0:
        raise ValueError(f"only a new session can be restored, this one has {session.frames} frames")
    for frame in frames:
        check_rgb(frame)
    if emitted < -1 or (emitted >= 0 and not frames):
        raise ValueError(f"segment {emitted} cannot rest on {len(frames)} frames")
