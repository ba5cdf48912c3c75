"""A policy that keeps the session rules and answers zero motion: what is left is the cost of the protocol.

It shows what a server costs without a model, and tests fly it; it follows readiness rules D and F exactly.
Source: spec/session_protocol.md 1, 2.6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from worldvln_edge.config import ConfigError, HorizonConfig
from worldvln_edge.generation_profile import EXACT
from worldvln_edge.images import check_rgb
from worldvln_edge.runtime.sessions.available_memory import available_bytes
from worldvln_edge.runtime.sessions.policy import (
    ActionChunk,
    Emit,
    PolicyInfo,
    StoppedError,
    check_due,
    check_restorable,
)

_PAUSE_S = 0.01


class NullPolicy:
    """Zero motion for any observation.

    Args:
        horizon: frames of a trajectory and of a segment.
        image_hw: model size to report.
        infer_s: seconds to occupy the device thread for every emitted segment, to see how a server behaves under load.
    """

    def __init__(
        self,
        horizon: HorizonConfig | None = None,
        *,
        image_hw: tuple[int, int] = (640, 640),
        infer_s: float = 0.0,
    ):
        self.info = PolicyInfo(
            name="null",
            precision="fp32",
            backend="null",
            device="cpu",
            horizon=horizon or HorizonConfig(),
            image_hw=image_hw,
        )
        self.infer_s = infer_s

    session_bytes = 0

    def available_bytes(self) -> int | None:
        """Of the machine."""
        return available_bytes()

    def fit_frame(self, frame: np.ndarray) -> np.ndarray:
        """The frame as it is: nobody looks at it."""
        return frame

    def new_session(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", emit: Emit = "ahead"
    ) -> NullSession:
        """Open a trajectory; the prompts are kept and not used."""
        return NullSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt)


class NullSession:
    held_bytes = 0

    def __init__(self, policy: NullPolicy, prompt: str, *, seed: int, emit: Emit, negative_prompt: str = ""):
        self.prompt = prompt
        self.negative_prompt = negative_prompt
        self.frames = 0
        self.emitted = -1
        self._policy, self._seed, self._emit = policy, seed, emit

    def least_s(self, new_frames: int = 0, *, with_new_settings: bool = False) -> float | None:
        """Not known."""
        return None

    def observe(
        self,
        frames: Sequence[np.ndarray],
        *,
        budget_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ActionChunk | None:
        """See PolicySession.observe; the actions are zeros."""
        for frame in frames:
            check_rgb(frame)
        horizon = self._policy.info.horizon
        self.frames = min(self.frames + len(frames), horizon.num_frames)
        if self.done or self.need > 0:
            return None
        started = time.perf_counter()
        while (left_s := started + self._policy.infer_s - time.perf_counter()) > 0:
            if should_stop():
                raise StoppedError("stopped while it pretended to compute")
            time.sleep(min(left_s, _PAUSE_S))
        self.emitted += 1
        points = horizon.points
        return ActionChunk(
            segment=self.emitted,
            actions=np.zeros((points[self.emitted + 1] - points[self.emitted], 6), dtype=np.float32),
            observed_frames=self.frames,
            seed=self._seed,
            timings_ms={"generate": (time.perf_counter() - started) * 1e3},
        )

    def pass_over(self) -> None:
        """See PolicySession.pass_over."""
        check_due(self)
        self.emitted += 1

    def restore(self, frames: Sequence[np.ndarray], emitted: int) -> None:
        """See PolicySession.restore."""
        check_restorable(self, frames, emitted)
        self.frames = min(len(frames), self._policy.info.horizon.num_frames)
        self.emitted = emitted

    def work_ahead(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Nothing is prepared."""
        return False

    def predicted_frames(self, should_stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """Nothing is predicted."""
        return None

    def set_prompt(self, prompt: str) -> None:
        self.prompt = prompt

    def set_negative_prompt(self, negative_prompt: str) -> None:
        self.negative_prompt = negative_prompt

    def set_seed(self, seed: int) -> None:
        self._seed = seed

    def set_profile(self, name: str) -> None:
        """Nothing is generated, so all that there is is `exact`."""
        if name != EXACT:
            raise ConfigError(f"unknown profile {name!r}; the null policy has {EXACT} only")

    @property
    def need(self) -> int:
        if self.done:
            return 0
        ready_at = self._policy.info.horizon.points[self.emitted + (1 if self._emit == "ahead" else 2)]
        return max(0, ready_at - self.frames)

    @property
    def done(self) -> bool:
        return self.emitted == self._policy.info.horizon.segments - 1

    def close(self) -> None:
        """Nothing is held."""
