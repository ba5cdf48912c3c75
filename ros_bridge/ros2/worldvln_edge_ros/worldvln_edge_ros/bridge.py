"""The executable `bridge`: the lifecycle node of the Python package worldvln-edge."""

import sys


def main() -> None:
    """Start the node; says what to install where its package is missing."""
    try:
        from worldvln_edge.ros_bridge.lifecycle_node import main as run
    except ModuleNotFoundError as missing:
        sys.exit(
            f"worldvln_edge_ros: {missing}; install the bridge into the Python that ROS uses: pip install worldvln-edge"
        )
    run()
