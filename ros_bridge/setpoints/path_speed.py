"""How fast a chunk's path is flown: shares of its full speed, which is that of one action every 1/fps s.

Three things bound the share: limits and the end of the path, how fast a drone can gain speed, and at a border between
chunks how it moves already. Velocities themselves are bounded afterwards (`limits`): the share keeps progress along the
path with what the drone can do.

Legend: velocities [4] are x, y, z, yaw (ENU; m/s, rad/s).
"""

from __future__ import annotations

import math

import numpy as np

from worldvln_edge.ros_bridge.setpoints.chunk_path import ChunkPath
from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig

_REST_S, _REST_M_S, _REST_RAD_S = 0.05, 0.1, 0.1
"""A drone counts as slow when its velocity can be taken away within this time, and is not above these: with loose
limits the first alone would call a drone slow that is still on its way."""
_SLOWING_SHARE = 0.5
"""Of the acceleration limit, for slowing down towards the end of a chunk; the rest is left for corrections."""


def rest_speeds(limits: LimitsConfig) -> tuple[float, float]:
    """Speed (m/s) and turning (rad/s) up to which a drone counts as slow; at the end of a chunk it has to be."""
    return (
        min(_REST_S * limits.max_acceleration_m_s2, _REST_M_S),
        min(_REST_S * limits.max_yaw_acceleration_rad_s2, _REST_RAD_S),
    )


def allowed_share(path: ChunkPath, progress: float, limits: LimitsConfig) -> float:
    """Share that limits allow, and from which the drone can still stop at the end."""
    metres, turns = path.remaining(progress)
    x, y, z, turning = (float(value) for value in path.velocity_at(progress))
    # Never so slow that the end is not reached: what can be taken away at once may go on.
    slow, slow_turn = rest_speeds(limits)
    stoppable = max(math.sqrt(2 * _SLOWING_SHARE * limits.max_acceleration_m_s2 * metres), slow / 2)
    stoppable_turn = max(math.sqrt(2 * _SLOWING_SHARE * limits.max_yaw_acceleration_rad_s2 * turns), slow_turn / 2)
    return min(
        1.0,
        _share(math.hypot(x, y, z), stoppable),
        _share(math.hypot(x, y), limits.max_speed_m_s),
        _share(abs(z), limits.max_climb_m_s if z > 0 else limits.max_descent_m_s),
        _share(abs(turning), min(stoppable_turn, limits.max_yaw_rate_rad_s)),
    )


def reachable_share(path: ChunkPath, progress: float, limits: LimitsConfig, last: float, seconds: float) -> float:
    """Share after another tick, when it grows as fast as a drone can gain speed and turn.

    It grows from what was asked for in the last tick, not from how the drone moves: a bend that the drone has to be
    turned into makes it lag for a moment, and does not make it stop.

    Args:
        last: share of the last tick.
        seconds: since then.
    """
    velocity_4 = path.velocity_at(progress)
    full_after_s = max(
        float(np.linalg.norm(velocity_4[:3])) / limits.max_acceleration_m_s2,
        abs(float(velocity_4[3])) / limits.max_yaw_acceleration_rad_s2,
    )
    return last + seconds / full_after_s if full_after_s > seconds else 1.0


def share_of_motion(
    path: ChunkPath, progress: float, limits: LimitsConfig, velocity_3: np.ndarray, yaw_rate: float
) -> float:
    """Share at which a drone moves along a path that it has not been told of yet, 0 to 1."""
    velocity_4 = path.velocity_at(progress)
    speed = float(np.linalg.norm(velocity_4[:3]))
    if speed > rest_speeds(limits)[0]:
        share = float(velocity_3 @ velocity_4[:3]) / (speed * speed)
    else:  # it turns on the spot
        turning = float(velocity_4[3])
        share = yaw_rate / turning if turning else 0.0
    return min(max(share, 0.0), 1.0)


def _share(speed: float, largest: float) -> float:
    return largest / speed if speed > largest else 1.0
