"""The safety envelope: actions that are late, stale, not finite or beyond the limits become an explicit hold.

A hold is zero motion with its reason, for the whole segment. It replaces the actions before they are stored, so a
client that asks again is answered the same. The only place that does this.
Source: spec/session_protocol.md 7.2 (`hold`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.runtime.sessions.policy import ActionChunk

HoldReason = Literal["late", "stale", "nonfinite", "step_translation", "step_rotation", "speed", "turn_rate"]


@dataclass(frozen=True, kw_only=True)
class EnvelopeConfig:
    """What may be flown. None: not limited."""

    step_cm: float | None = None
    """Translation of one step."""
    step_deg: float | None = None
    """Rotation of one step about any axis."""
    second_cm: float | None = None
    """Way flown within any second, the steps before the segment included."""
    second_deg: float | None = None
    """Rotation within any second, summed over its steps, about any axis."""
    age_s: float | None = None
    """Since the newest frame that the segment rests on reached the server."""
    hold_late: bool = True
    """Actions that come after their deadline are held, instead of being marked `late`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "hold_late" and value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"envelope: {field.name} must be above 0 and finite, found {value}")


def read_envelope(path: Path) -> EnvelopeConfig:
    """An envelope from a JSON object with the fields of `EnvelopeConfig`.

    Raises:
        ConfigError: unreadable, an unknown field, or a wrong value.
    """
    try:
        found = msgspec.json.decode(path.read_bytes())
        unknown = set(found) - {field.name for field in fields(EnvelopeConfig)} if isinstance(found, dict) else set()
        if unknown:
            raise ConfigError(f"unknown field {sorted(unknown)[0]!r}")
        return msgspec.convert(found, EnvelopeConfig)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a JSON file with the envelope") from error
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}; see docs/operations.md for the fields of an envelope") from error


class Envelope:
    """Checks segments.

    Args:
        config: the limits.
        fps: steps of a second.
    """

    def __init__(self, config: EnvelopeConfig, *, fps: int):
        self.config = config
        self._window = fps

    @property
    def steps_before(self) -> int:
        """How many steps in front of a segment may lie in one second with its first one."""
        return self._window - 1

    def apply(self, chunk: ActionChunk, *, flown_before: np.ndarray, age_s: float, late_s: float | None) -> ActionChunk:
        """The chunk, or a hold in its place.

        Args:
            chunk: actions [N, 6], cm and deg.
            flown_before: the last actions in front of the segment, as they were answered: float [M, 6]; those beyond
                `steps_before` do not matter, M may be 0.
            age_s: of the newest frame that the segment rests on.
            late_s: how long after its deadline it is; None: in time, or without one.
        """
        reason = self.reason(chunk.actions, flown_before=flown_before, age_s=age_s, late_s=late_s)
        if reason is None:
            return chunk
        return replace(chunk, actions=np.zeros_like(chunk.actions), hold=reason)

    def reason(
        self, actions: np.ndarray, *, flown_before: np.ndarray, age_s: float, late_s: float | None
    ) -> HoldReason | None:
        """Why these actions must not be flown; None if they may. See `apply`."""
        config = self.config
        if late_s is not None and config.hold_late:
            return "late"
        if config.age_s is not None and age_s > config.age_s:
            return "stale"
        if not np.isfinite(actions).all():
            return "nonfinite"
        ways, turns = _sizes(actions)
        if config.step_cm is not None and (ways > config.step_cm).any():
            return "step_translation"
        if config.step_deg is not None and (turns > config.step_deg).any():
            return "step_rotation"
        before = flown_before[max(0, len(flown_before) - self.steps_before) :]
        ways_before, turns_before = _sizes(before.reshape(-1, 6))
        if config.second_cm is not None and self._largest_sum(ways_before, ways) > config.second_cm:
            return "speed"
        if config.second_deg is not None and self._largest_sum(turns_before, turns) > config.second_deg:
            return "turn_rate"
        return None

    def _largest_sum(self, before: np.ndarray, sizes: np.ndarray) -> float:
        """Over any second that a new step belongs to."""
        sums = np.convolve(np.concatenate([before, sizes]), np.ones(self._window))
        return float(sums[len(before) : len(before) + len(sizes)].max(initial=0.0))


def _sizes(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length of every step in cm, and its largest rotation about one axis in deg: float64 [N] each."""
    steps = actions.astype(np.float64)
    return np.linalg.norm(steps[:, :3], axis=1), np.abs(steps[:, 3:]).max(axis=1, initial=0.0)
