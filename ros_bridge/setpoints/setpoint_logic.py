"""From action chunks to bounded velocities: what the setpoint process does at each tick, without clock, thread or ROS.

Whoever calls brings the time. A tick answers one of three things:

    fly      follow the chunk: velocity along its path plus a correction towards it, acceleration bounded
    hold     zero velocity. At the end of a chunk the drone has slowed down by then, within the acceleration limit; for
             any other reason at once, and the autopilot brakes as hard as its own limits allow
    silent   publish nothing, no heartbeat either: the policy is gone, and the autopilot's fail-safe shall act

Limits come last, over everything. Faults are latched: hold until `reset`.

Legend: poses and velocities [4] are x, y, z, yaw (ENU; m, rad; m/s, rad/s). Times are monotonic seconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from worldvln_edge.ros_bridge.conversions import wrap_rad
from worldvln_edge.ros_bridge.setpoints.chunk_path import ChunkPath
from worldvln_edge.ros_bridge.setpoints.fault_latch import FaultLatch
from worldvln_edge.ros_bridge.setpoints.limits import (
    AllowedVelocities,
    LimitsConfig,
    approach_rate,
    approach_velocity,
)
from worldvln_edge.ros_bridge.setpoints.odometry_track import OdometryConfig, OdometryTrack
from worldvln_edge.ros_bridge.setpoints.path_speed import allowed_share, reachable_share, rest_speeds, share_of_motion
from worldvln_edge.ros_bridge.setpoints.pose_reference import PoseReference
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig

Mode = Literal["fly", "hold", "silent"]
_LONGEST_TICK_S = 0.1
"""A tick that comes later counts as this long: nothing is made up for."""
_TAIL = 1e-3
"""Progress that is left standing in front of the end until the drone is slow."""
_MOST_TURN_DEG = 180.0
"""Of one action: whoever wants more would turn the other way."""


class Setpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What to publish now. `reason` says why the drone does not fly; empty while it does."""

    mode: Mode
    velocity_m_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """x, y, z of the odometry's world (ENU)."""
    yaw_rate_rad_s: float = 0.0
    pose_4: tuple[float, float, float, float] | None = None
    """The same motion as a place to be at: x, y, z, yaw. None while nobody knows where the drone is."""
    reason: str = ""
    chunk: int | None = None
    """Number of the chunk that is flown or was used up last."""
    progress: float = 0.0
    """How many of its actions were consumed."""


class SetpointLogic:
    def __init__(self, config: SetpointConfig, limits: LimitsConfig, odometry: OdometryConfig | None = None):
        self.config, self.limits = config, limits
        self.faults = FaultLatch()
        self._odometry = OdometryTrack(odometry or OdometryConfig(), limits.max_speed_m_s)
        # As far ahead of the drone as the path's progress may be at most.
        self._reference = PoseReference(limits, 2 * config.max_lag_m, 2 * config.max_lag_rad)
        self._policy_seen_s: float | None = None
        self._last_tick_s: float | None = None
        self._velocity_3, self._yaw_rate = np.zeros(3), 0.0
        self._share = 0.0  # of full speed along the path, in the last tick
        self._newest_chunk = -1
        self._is_halted = False
        self._path: ChunkPath | None = None
        self._chunk_number: int | None = None
        self._chunk_seen_s, self._progress = 0.0, 0.0

    def policy_alive(self, seen_s: float, now_s: float) -> None:
        """The policy, and the server behind it, were alive at `seen_s`; a time behind `now_s` counts as now."""
        seen_s = min(seen_s, now_s)
        if self._policy_seen_s is None or seen_s > self._policy_seen_s:
            self._policy_seen_s = seen_s

    def policy_restarted(self) -> None:
        """Another policy process has connected: its chunks are numbered anew, those of the old one are not flown."""
        self._drop_chunk()
        self._newest_chunk, self._is_halted = -1, False

    def odometry(self, position_3: np.ndarray, yaw_rad: float, now_s: float) -> None:
        """Where the drone is. Anything not finite makes it hold."""
        if not self._odometry.push(position_3, yaw_rad, now_s):
            self.faults.set("odometry_jump", "the odometry jumped further than the drone can have flown or turned")

    def chunk(self, number: int, actions_N6: np.ndarray, *, fps: float, seen_s: float, now_s: float) -> str | None:
        """Fly these actions from now on, in place of what is left of those before.

        Args:
            number: grows from chunk to chunk; one that does not is ignored.
            actions_N6: cm, deg (spec/session_protocol.md 3).
            fps: actions a second.
            seen_s: when the newest frame was taken that they rest on; the path starts where the drone was then.

        Returns:
            Why it is not flown; None if it is. Actions that no sane policy sends are latched as a fault as well.
        """
        if number <= self._newest_chunk:
            return f"chunk {number} is not newer than chunk {self._newest_chunk}"
        self._newest_chunk = number
        actions = np.asarray(actions_N6, np.float64)
        nonsense = self._why_nonsense(actions, fps, seen_s, now_s)
        if nonsense is not None:
            self.faults.set("bad_chunk", f"chunk {number} {nonsense}")
            self._drop_chunk()
            return nonsense
        if self._is_halted:
            return "the flight was stopped by a command"
        start = self._odometry.at(seen_s)
        if start is None:
            return "there is no odometry for the moment at which its frame was taken"
        self._path, self._chunk_number, self._chunk_seen_s = ChunkPath(start, actions, fps), number, seen_s
        # What was flown since the frame was taken, along the chunk before, is not flown twice.
        elapsed_actions = (now_s - seen_s) * fps
        self._progress = self._path.nearest_progress(self._odometry.newest[:3], elapsed_actions)
        # The drone goes on at the speed that it has: what differs in direction is blended within the limits.
        self._share = share_of_motion(self._path, self._progress, self.limits, self._velocity_3, self._yaw_rate)
        return None

    @property
    def path(self) -> ChunkPath | None:
        """Of the chunk that is flown; None without one."""
        return self._path

    def stop(self) -> None:
        """The policy's flight has ended, or another one begins: hold."""
        self._drop_chunk()
        self._is_halted = False

    def halt(self) -> None:
        """The operator's stop: hold, and fly no chunk of this flight any more, also if the policy has not heard it."""
        self._drop_chunk()
        self._is_halted = True

    def reset(self) -> tuple[str, ...]:
        """Forget the latched faults, and the chunk; their names. A cause that is still there is latched again."""
        self._drop_chunk()
        return self.faults.reset()

    def tick(self, now_s: float) -> Setpoint:
        """The setpoint of this moment; call it 20 to 50 times a second."""
        seconds = self._seconds_since_last(now_s)
        silent = self._why_silent(now_s)
        if silent is not None:
            self._drop_chunk()
            return self._at_rest("silent", silent)
        amiss = self._why_amiss(now_s)
        if amiss is not None:
            return self._at_rest("hold", amiss)
        assert self._path is not None, "without a chunk the drone holds"
        consumed = self._progress  # by now; what this tick adds is flown until the next
        if self._progress < self._path.length:
            wanted_4, reason = self._follow(self._path, seconds), ""
        else:
            wanted_4, reason = np.zeros(4), "the chunk is used up"
        here_4, limits = self._odometry.newest, self.limits
        self._velocity_3 = approach_velocity(
            self._velocity_3,
            wanted_4[:3],
            AllowedVelocities.at(here_4[:3], limits),
            limits.max_acceleration_m_s2 * seconds,
        )
        self._yaw_rate = approach_rate(
            self._yaw_rate, float(wanted_4[3]), limits.max_yaw_rate_rad_s, limits.max_yaw_acceleration_rad_s2 * seconds
        )
        self._reference.advance(np.array([*self._velocity_3, self._yaw_rate]), seconds, here_4)
        return self._setpoint("hold" if reason else "fly", reason, consumed)

    def _why_silent(self, now_s: float) -> str | None:
        if self._policy_seen_s is None:
            return "no policy has connected yet"
        silent_s = now_s - self._policy_seen_s
        return "the policy is gone" if silent_s > self.config.silent_after_s else None

    def _why_amiss(self, now_s: float) -> str | None:
        """Reasons to hold at once."""
        assert self._policy_seen_s is not None, "without a policy there is silence"
        unusable = self._odometry.why_unusable(now_s)
        if unusable is not None:
            return unusable
        if self.limits.is_beyond_geofence(self._odometry.newest[:3]):
            self.faults.set("geofence", "the drone is outside of the geofence")
        if self.faults.names:
            return f"latched: {', '.join(self.faults.names)}"
        if now_s - self._policy_seen_s > self.config.hold_after_s:
            return "the policy does not answer"
        if self._path is not None and now_s - self._chunk_seen_s > self.config.stale_after_s:
            self._drop_chunk()
            return "the chunk is stale"
        return "no chunk" if self._path is None else None

    def _follow(self, path: ChunkPath, seconds: float) -> np.ndarray:
        """Velocity [4] along the chunk, with the correction towards it; counts what this tick consumes."""
        config, here_4 = self.config, self._odometry.newest
        share = min(
            allowed_share(path, self._progress, self.limits),
            reachable_share(path, self._progress, self.limits, self._share, seconds),
        )
        share *= self._share_of_lag(path, here_4)
        # Flown through: what is left is to come to the end, and that is the correction's.
        share = 0.0 if self._progress >= path.length - _TAIL else share
        self._share = share
        velocity_4 = share * path.velocity_at(self._progress)
        progress = min(self._progress + share * path.fps * seconds, path.length - _TAIL)
        offset_4 = path.pose_at(self._progress) - here_4  # the velocity leads on from here
        correction_3 = config.correction_gain * offset_4[:3]
        length = float(np.linalg.norm(correction_3))
        if length > config.max_correction_m_s:
            correction_3 *= config.max_correction_m_s / length
        turn = config.correction_gain * float(wrap_rad(offset_4[3]))
        velocity_4[:3] += correction_3
        velocity_4[3] += min(max(turn, -config.max_turn_correction_rad_s), config.max_turn_correction_rad_s)
        # The end counts as reached when the drone is slow and nothing calls it further.
        is_at_end = progress >= path.length - _TAIL and self._is_slow(velocity_4)
        is_at_end = is_at_end and self._is_slow(np.array([*self._velocity_3, self._yaw_rate]))
        self._progress = float(path.length) if is_at_end else progress
        return velocity_4

    def _is_slow(self, velocity_4: np.ndarray) -> bool:
        speed, turning = float(np.linalg.norm(velocity_4[:3])), abs(float(velocity_4[3]))
        slow, slow_turn = rest_speeds(self.limits)
        return speed <= slow and turning <= slow_turn

    def _share_of_lag(self, path: ChunkPath, here_4: np.ndarray) -> float:
        """Progress waits for a drone that cannot follow."""
        offset_4 = path.pose_at(self._progress) - here_4
        lag = max(
            float(np.linalg.norm(offset_4[:3])) / self.config.max_lag_m,
            abs(float(wrap_rad(offset_4[3]))) / self.config.max_lag_rad,
        )
        return min(max(2.0 - lag, 0.0), 1.0)

    def _why_nonsense(self, actions: np.ndarray, fps: float, seen_s: float, now_s: float) -> str | None:
        if actions.ndim != 2 or actions.shape[1] != 6 or not len(actions):
            return f"has the shape {actions.shape}, not [N, 6]"
        if not np.isfinite(actions).all():
            return "holds numbers that are not finite"
        longest_m = float(np.linalg.norm(actions[:, :3], axis=1).max()) / 100
        if longest_m > self.config.max_step_m:
            return f"moves {longest_m:.2f} m in one action; {self.config.max_step_m:g} m are allowed"
        widest_deg = float(np.abs(actions[:, 4]).max())
        if widest_deg > _MOST_TURN_DEG:
            return f"turns by {widest_deg:g} deg in one action; {_MOST_TURN_DEG:g} are allowed"
        if not 0 < fps <= 100:
            return f"counts {fps:g} actions a second"
        if seen_s > now_s:
            return "rests on a frame from the future"
        return None

    def _seconds_since_last(self, now_s: float) -> float:
        last_s, self._last_tick_s = self._last_tick_s, now_s
        if last_s is None:
            return self.config.period_s
        return min(max(now_s - last_s, 0.0), _LONGEST_TICK_S)

    def _drop_chunk(self) -> None:
        self._path, self._chunk_number = None, None
        self._chunk_seen_s, self._progress = 0.0, 0.0

    def _at_rest(self, mode: Mode, reason: str) -> Setpoint:
        was_moving = bool(self._velocity_3.any()) or self._yaw_rate != 0
        self._velocity_3, self._yaw_rate, self._share = np.zeros(3), 0.0, 0.0
        if mode == "silent":
            self._reference.forget()
        elif self._odometry.has_pose:
            here_4 = self._odometry.newest
            if was_moving or self._reference.pose_4 is None:
                self._reference.settle(here_4)
            else:  # a pilot who flies it elsewhere takes the pose along
                self._reference.advance(np.zeros(4), 0.0, here_4)
        return self._setpoint(mode, reason, self._progress)

    def _setpoint(self, mode: Mode, reason: str, consumed: float) -> Setpoint:
        x, y, z = (float(value) for value in self._velocity_3)
        pose = self._reference.pose_4
        return Setpoint(
            mode=mode,
            velocity_m_s=(x, y, z),
            yaw_rate_rad_s=self._yaw_rate,
            pose_4=None if pose is None else tuple(pose.tolist()),
            reason=reason,
            chunk=self._chunk_number,
            progress=consumed,
        )
