from collections.abc import Sequence

class TrajectorySetpoint:
    def __init__(
        self,
        *,
        timestamp: int = ...,
        position: Sequence[float] = ...,
        velocity: Sequence[float] = ...,
        acceleration: Sequence[float] = ...,
        jerk: Sequence[float] = ...,
        yaw: float = ...,
        yawspeed: float = ...,
    ) -> None: ...

class OffboardControlMode:
    def __init__(
        self,
        *,
        timestamp: int = ...,
        position: bool = ...,
        velocity: bool = ...,
        acceleration: bool = ...,
        attitude: bool = ...,
        body_rate: bool = ...,
        thrust_and_torque: bool = ...,
        direct_actuator: bool = ...,
    ) -> None: ...

class VehicleOdometry:
    timestamp_sample: int
    pose_frame: int
    position: Sequence[float]
    q: Sequence[float]
