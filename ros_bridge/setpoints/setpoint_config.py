"""What the setpoint process is told, besides the limits."""

from __future__ import annotations

import msgspec


class SetpointConfigError(ValueError):
    """Settings that cannot work together. The message says which, what was found and what is allowed."""


class SetpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rate_hz: float = 40.0
    """Setpoints a second, 20 to 50."""
    realtime_priority: int = 0
    """1 to 99: SCHED_FIFO for the setpoint process, so that inference cannot delay it; 0: none."""
    hold_after_s: float = 0.05
    """Silence of the policy (or of its server) after which the drone holds. With one period of the loop it makes the
    100 ms within which a hold must begin."""
    silent_after_s: float = 0.5
    """Silence after which setpoints and heartbeat stop, so that the autopilot's own fail-safe acts."""
    stale_after_s: float = 4.0
    """A chunk is not flown when the frame it rests on is older."""
    max_step_m: float = 1.0
    """One action that moves further is a fault of the policy."""
    correction_gain: float = 1.0
    """Velocity towards the path for each metre beside it, 1/s."""
    max_correction_m_s: float = 0.5
    max_turn_correction_rad_s: float = 0.3
    max_lag_m: float = 0.5
    max_lag_rad: float = 0.3
    """Progress slows down when the drone is further from the path than these, and stops at twice of them."""

    def __post_init__(self) -> None:
        if not 20 <= self.rate_hz <= 50:
            raise SetpointConfigError(f"setpoint.rate_hz must be 20 to 50, found {self.rate_hz:g}")
        if not 0 <= self.realtime_priority <= 99:
            raise SetpointConfigError(f"setpoint.realtime_priority must be 0 to 99, found {self.realtime_priority}")
        for name in (
            "hold_after_s",
            "stale_after_s",
            "max_step_m",
            "max_correction_m_s",
            "max_turn_correction_rad_s",
            "max_lag_m",
            "max_lag_rad",
        ):
            if not 0 < getattr(self, name) < 60:
                raise SetpointConfigError(f"setpoint.{name} must be over 0 and below 60, found {getattr(self, name):g}")
        if not 0 <= self.correction_gain <= 5:
            raise SetpointConfigError(f"setpoint.correction_gain must be 0 to 5, found {self.correction_gain:g}")
        if self.hold_after_s + self.period_s > 0.1:
            raise SetpointConfigError(
                f"setpoint.hold_after_s {self.hold_after_s:g} and a period of {self.period_s:.3f} s are more than the "
                "0.1 s within which a hold must begin; shorten hold_after_s or raise rate_hz"
            )
        if not self.hold_after_s < self.silent_after_s <= 0.5:
            raise SetpointConfigError(
                f"setpoint.silent_after_s must be over hold_after_s ({self.hold_after_s:g}) and at most 0.5, found "
                f"{self.silent_after_s:g}"
            )

    @property
    def period_s(self) -> float:
        return 1.0 / self.rate_hz
