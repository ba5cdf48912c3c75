"""Open the way to the wire that the user names; each needs packages of its own, imported here when it is chosen."""

from __future__ import annotations

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.ports.port import Port

WAYS = ("dds",)


def open_port(via: str, config: BridgeConfig) -> Port:
    """Raises ValueError: not one of WAYS; or what the way itself raises (`dds_port.DdsError`)."""
    if via == "dds":
        from worldvln_edge.ros_bridge.ports.dds_port import DdsPort

        return DdsPort(config.dds, config.topics)
    raise ValueError(f"{via!r} is no way to the wire; choose one of {', '.join(WAYS)}")
