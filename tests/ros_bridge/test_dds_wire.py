"""DDS without a ROS installation: what a wire leaves behind."""

import gc
import os

import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")


from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.ports.dds_wire import DdsError, DdsWire


def test_closed_wire_gives_its_domain_back_though_it_is_still_known():
    config = DdsConfig(domain_id=1 + os.getpid() % 200, network_interface="lo")
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            wire = DdsWire(config)
            wire.subscribe("/words", wire.types.String, lambda message, source, wire=wire: wire.close())
            wire.publish("/other", wire.types.String(data="a"))
            with pytest.raises(DdsError, match="cannot be joined over lo"):
                DdsWire(config)
            wire.close()
            wire.close()
    finally:
        gc.enable()
