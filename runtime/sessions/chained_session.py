"""Flights longer than the model's horizon: one trajectory made of horizons, each of which starts where the last ended.

When all segments of a horizon were emitted and its last frame is there, that frame becomes frame 1 of the next one,
with the same prompt and seed. Frames and segments go on counting, so a client does not notice.
Source: spec/session_protocol.md 1, 2.6; spec/README.md ("horizon").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.sessions.policy import (
    ActionChunk,
    Emit,
    NonFiniteActionsError,
    Policy,
    PolicySession,
    check_restorable,
)


def chained_horizon(horizon: HorizonConfig, horizons: int) -> HorizonConfig:
    """The frames of a whole trajectory: neighbours share one frame."""
    return msgspec.structs.replace(horizon, num_frames=1 + horizons * (horizon.num_frames - 1))


class ChainedSession:
    """See `PolicySession`. Frames behind the current horizon are not taken: `frames` tells how many were.

    Args:
        policy: opens a session for every horizon.
        horizons: how many at most.
        prompt, seed, negative_prompt, emit: of all of them.
    """

    def __init__(
        self,
        policy: Policy,
        prompt: str,
        *,
        horizons: int,
        seed: int = 0,
        negative_prompt: str = "",
        emit: Emit = "ahead",
    ):
        self._policy, self._horizons = policy, horizons
        self._one = policy.info.horizon
        self._whole = chained_horizon(self._one, horizons)
        self._prompt, self._seed, self._negative_prompt, self._emit = prompt, seed, negative_prompt, emit
        self._profile: str | None = None  # the policy's own
        self._index = 0
        self._current = self._open()
        self._anchor: np.ndarray | None = None  # newest frame

    @property
    def frames(self) -> int:
        shared = 1 if self._index else 0  # with the horizon before, so it was taken even if this one has not got it yet
        return self._index * (self._one.num_frames - 1) + max(self._current.frames, shared)

    @property
    def emitted(self) -> int:
        return self._index * self._one.segments + self._current.emitted

    @property
    def need(self) -> int:
        if self.done:
            return 0
        ready_at = self._whole.points[self.emitted + (1 if self._emit == "ahead" else 2)]
        return max(0, ready_at - self.frames)

    @property
    def done(self) -> bool:
        return self._index + 1 == self._horizons and self._current.done

    @property
    def held_bytes(self) -> int:
        return self._current.held_bytes + (0 if self._anchor is None else self._anchor.nbytes)

    def observe(
        self,
        frames: Sequence[np.ndarray],
        *,
        budget_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ActionChunk | None:
        """See `PolicySession.observe`."""
        while True:
            before = self._current.frames
            if self._index and before == 0:
                assert self._anchor is not None  # the horizon before was full
                frames = (self._anchor, *frames)
            room = self._one.num_frames - before
            now, frames = frames[:room], frames[room:]
            try:
                chunk = self._current.observe(now, budget_s=budget_s, should_stop=should_stop)
            except NonFiniteActionsError as error:
                ours = replace(error.chunk, segment=self.emitted + 1, observed_frames=self.frames)
                raise NonFiniteActionsError(ours) from error
            finally:
                if taken := self._current.frames - before:
                    self._anchor = now[taken - 1]
            if chunk is not None:
                return replace(chunk, segment=self.emitted, observed_frames=self.frames)
            if not self._current.done or self._current.frames < self._one.num_frames or self.done:
                return None
            self._next_horizon()

    def pass_over(self) -> None:
        """See `PolicySession.pass_over`."""
        self._current.pass_over()

    def restore(self, frames: Sequence[np.ndarray], emitted: int) -> None:
        """See `PolicySession.restore`; only the horizon that was being flown is taken up again."""
        check_restorable(self, frames, emitted)
        per_horizon, segments = self._one.num_frames - 1, self._one.segments
        # A horizon begins with its first segment, so not before the one in front of it was all emitted.
        self._index = min(max(0, len(frames) - 1) // per_horizon, (emitted + 1) // segments, self._horizons - 1)
        taken = frames[self._index * per_horizon :][: self._one.num_frames]
        self._current.restore(taken, emitted - self._index * segments)
        self._anchor = taken[-1] if taken else None

    def _next_horizon(self) -> None:
        """Start it; the frame that both horizons share is still to be given to it."""
        following = self._open()
        self._current.close()
        self._current, self._index = following, self._index + 1

    def _open(self) -> PolicySession:
        session = self._policy.new_session(
            self._prompt, seed=self._seed, negative_prompt=self._negative_prompt, emit=self._emit
        )
        if self._profile is not None:
            session.set_profile(self._profile)
        return session

    def least_s(self, new_frames: int = 0, *, with_new_settings: bool = False) -> float | None:
        """See `PolicySession.least_s`; not known for the first segment of a horizon that has not begun."""
        return self._current.least_s(new_frames, with_new_settings=with_new_settings)

    def work_ahead(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """See `PolicySession.work_ahead`."""
        return self._current.work_ahead(should_stop)

    def predicted_frames(self, should_stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """See `PolicySession.predicted_frames`; None until the running horizon has emitted a segment."""
        return self._current.predicted_frames(should_stop)

    def set_prompt(self, prompt: str) -> None:
        """Replace the prompt for the segments still to come, in this horizon and the following ones."""
        self._prompt = prompt
        self._current.set_prompt(prompt)

    def set_negative_prompt(self, negative_prompt: str) -> None:
        """Replace the negative prompt likewise."""
        self._negative_prompt = negative_prompt
        self._current.set_negative_prompt(negative_prompt)

    def set_seed(self, seed: int) -> None:
        """Replace the seed likewise."""
        self._seed = seed
        self._current.set_seed(seed)

    def set_profile(self, name: str) -> None:
        """Replace the generation profile likewise."""
        self._current.set_profile(name)
        self._profile = name

    def close(self) -> None:
        self._anchor = None
        self._current.close()


@dataclass(frozen=True, kw_only=True)
class SettledRule:
    """When a drone has arrived: it hardly moves any more. UAV-Flow's rule."""

    steps: int = 10
    cm: float = 3.0
    """Every step's translation is shorter."""
    deg: float = 1.0
    """Every step's rotation is less, about every axis."""

    def after(self, chunk: ActionChunk, before: int) -> int:
        """`still_steps` after a chunk was answered: a hold stands still, but not because the drone has arrived."""
        return before if chunk.hold is not None else self.still_steps(before, chunk.actions)

    def still_steps(self, before: int, actions: np.ndarray) -> int:
        """Steps without motion at the end of what was flown so far.

        Args:
            before: the same, up to `actions`.
            actions: [N, 6], cm and deg.
        """
        moves = (np.linalg.norm(actions[:, :3], axis=1) >= self.cm) | (np.abs(actions[:, 3:]) >= self.deg).any(axis=1)
        last = np.flatnonzero(moves)
        return len(actions) - 1 - int(last[-1]) if len(last) else before + len(actions)
