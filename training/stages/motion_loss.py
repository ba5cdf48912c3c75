"""Loss of predicted motions: per window, and at the end of the path that the windows of a run make.

Legend: K windows of W frames, N frames of a run; deltas [dyaw, dpitch, droll, tx, ty, tz].
Source: spec/training.md 4.3 (weights, endpoint term), 4.6 (averaging), 4.7 (integration).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from worldvln_edge.config import ConfigError

_MOVING = [0, 3, 4, 5]


class Ramp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A weight that goes linearly from `start` in the first epoch to `end` in epoch `epochs` (1-based), then stays."""

    start: float
    end: float
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or min(self.start, self.end) < 0:
            raise ConfigError(f"a ramp needs epochs >= 1 and weights >= 0, found {self}")

    def at(self, epoch: int) -> float:
        """Weight of a 0-based epoch."""
        if epoch + 1 >= self.epochs:
            return self.end
        return self.start + epoch / (self.epochs - 1) * (self.end - self.start)


class MotionSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the motion loss by epoch. Defaults are the published values; small presets use 1 everywhere."""

    rotation: Ramp = Ramp(start=0.05, end=0.25, epochs=15)
    xy: float = 1.0
    z: Ramp = Ramp(start=2.0, end=2.0)
    """Vertical translation."""

    def __post_init__(self) -> None:
        if self.xy < 0:
            raise ConfigError(f"weights.xy must be >= 0, found {self.xy}")

    def at(self, epoch: int) -> dict[str, float]:
        """Weights of a 0-based epoch."""
        return {"rotation": self.rotation.at(epoch), "xy": self.xy, "z": self.z.at(epoch)}


def motion_terms(predicted_KW6: Tensor, target_KW6: Tensor) -> dict[str, Tensor]:
    """Mean squared error of every window's normalised deltas [K], rotation, horizontal and vertical translation apart.

    Source: spec/training.md 4.3.
    """
    squared = (predicted_KW6 - target_KW6) ** 2
    return {
        "rotation": squared[..., :3].mean((1, 2)),
        "xy": squared[..., 3:5].mean((1, 2)),
        "z": squared[..., 5].mean(1),
    }


def logged_errors(predicted_KW6: Tensor, target_KW6: Tensor) -> Tensor:
    """Mean squared error of every window's normalised deltas [K] in the columns that move, without a gradient.

    Roll and pitch of a drone in level flight say little.
    """
    return (predicted_KW6.detach() - target_KW6)[..., _MOVING].square().mean((1, 2))


def average_deltas(deltas_KW6: Tensor, starts: Sequence[int], frames: int) -> Tensor:
    """Mean of all predictions of every motion of a run: [N-1, 6]. Differentiable `action_windows.average_windows`."""
    windows, motions = deltas_KW6.shape[:2]
    rows = torch.tensor(starts, device=deltas_KW6.device)[:, None] + torch.arange(motions, device=deltas_KW6.device)
    total = deltas_KW6.new_zeros(frames - 1, 6).index_add(0, rows.flatten(), deltas_KW6.flatten(0, 1))
    count = deltas_KW6.new_zeros(frames - 1).index_add(0, rows.flatten(), deltas_KW6.new_ones(windows * motions))
    return total / count[:, None]


def endpoint_loss(predicted_N6: Tensor, true_N6: Tensor) -> Tensor:
    """Squared distance of the ends (m) plus squared yaw error (rad) of two paths from one pose; motions in rad, m."""
    (end, rotation), (true_end, true_rotation) = _integrate(predicted_N6), _integrate(true_N6)
    turned = _yaw(rotation) - _yaw(true_rotation)
    turned = torch.atan2(torch.sin(turned), torch.cos(turned))
    return (end - true_end).square().sum() + turned.square()


def _integrate(deltas_N6: Tensor) -> tuple[Tensor, Tensor]:
    """Last position [3] and rotation [3, 3] of a path from the origin; see `rigid_motion.integrate_deltas`."""
    yaw, pitch, roll = deltas_N6[:, :3].unbind(1)
    turns = _about(roll, 0) @ _about(pitch, 1) @ _about(yaw, 2)
    position, rotation = deltas_N6.new_zeros(3), torch.eye(3, dtype=deltas_N6.dtype, device=deltas_N6.device)
    for step, turn in zip(deltas_N6[:, 3:], turns, strict=True):
        position = position + rotation @ step
        rotation = rotation @ turn
    return position, rotation


def _about(angles_N: Tensor, axis: int) -> Tensor:
    """Right-handed rotations about one axis: [N, 3, 3]."""
    cos, sin = torch.cos(angles_N), torch.sin(angles_N)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rows = (
        ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos)),
        ((cos, zero, sin), (zero, one, zero), (-sin, zero, cos)),
        ((cos, -sin, zero), (sin, cos, zero), (zero, zero, one)),
    )[axis]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _yaw(rotation: Tensor) -> Tensor:
    return torch.atan2(-rotation[0, 1], rotation[0, 0])
