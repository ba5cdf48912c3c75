"""What the tests of the ROS bridge share."""

from collections.abc import Iterator

import pytest
from ros_master import ros_master


@pytest.fixture(scope="session")
def roscore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a real master. One for all tests: a process is a node of one master, and this process joins it."""
    with ros_master(tmp_path_factory.mktemp("roscore")) as uri:
        yield uri
