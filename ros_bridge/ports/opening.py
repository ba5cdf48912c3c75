"""Open the way to the wire that the user names; each needs packages of its own, imported here when it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.flight import Flight
from worldvln_edge.ros_bridge.ports.message_port import MessagePort
from worldvln_edge.ros_bridge.ports.wire import Wire

_log = logging.getLogger(__name__)
WAYS = ("dds", "ros1", "ros2")


class WireMissingError(RuntimeError):
    """The packages of a way are not installed. The message says what to install or source."""


def open_wire(via: str, config: BridgeConfig, *, name: str = "worldvln") -> Wire:
    """
    Args:
        via: one of WAYS.
        name: of the node, where the way has nodes.

    Raises:
        ValueError: not one of WAYS.
        DdsError, RospyError, RclpyError: see `dds_wire`, `rospy_wire`, `rclpy_wire`.
        WireMissingError: the way's own packages are not installed.
    """
    if via == "dds":
        from worldvln_edge.ros_bridge.ports.dds_wire import DdsWire

        return DdsWire(config.dds)
    if via == "ros1":
        try:
            from worldvln_edge.ros_bridge.ports.rospy_wire import RospyWire, check_topics
        except ImportError as missing:
            raise WireMissingError(str(missing)) from missing
        check_topics(config.topics)
        return RospyWire(name)
    if via == "ros2":
        try:
            from worldvln_edge.ros_bridge.ports.rclpy_wire import RclpyWire
        except ImportError as missing:
            raise WireMissingError(str(missing)) from missing
        return RclpyWire(name, config.topics)
    raise ValueError(f"{via!r} is no way to the wire; choose one of {', '.join(WAYS)}")


def open_port(via: str, config: BridgeConfig, *, name: str = "worldvln") -> MessagePort:
    """The bridge's port over that wire. Raises as `open_wire`."""
    return MessagePort(open_wire(via, config, name=name), config.topics)


@contextmanager
def goals_served(wire: Wire, request: Callable[[str], Flight]) -> Iterator[None]:
    """Serve instructions as goals of an action, where the way has actions: with `ros2`."""
    node = getattr(wire, "node", None)
    if node is None:
        yield
        return
    try:
        from worldvln_edge.ros_bridge.ports.rclpy_fly_action import FlyActionServer
    except ModuleNotFoundError as missing:
        _log.warning(
            "no action server: %s; build ros_bridge/ros2 with colcon, or send instructions on their topic", missing
        )
        yield
        return
    server = FlyActionServer(node, request)
    try:
        yield
    finally:
        server.close()
