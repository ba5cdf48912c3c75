"""Another publisher on the camera topic, as when a driver was started twice: `second_camera.py VIA CONFIG`."""

import sys
import time
from pathlib import Path

from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
from worldvln_edge.ros_bridge.ports.messages import MessageBuilder
from worldvln_edge.ros_bridge.ports.opening import open_wire

if __name__ == "__main__":
    config = read_bridge_config(Path(sys.argv[2]))
    wire = open_wire(sys.argv[1], config, name="second_camera")
    build = MessageBuilder(wire.types, config.topics, time.time_ns)
    while True:
        image = wire.types.Image(
            header=build.header(), height=16, width=16, encoding="rgb8", is_bigendian=0, step=48, data=bytes(768)
        )
        wire.publish(config.topics.image, image)
        time.sleep(0.04)
