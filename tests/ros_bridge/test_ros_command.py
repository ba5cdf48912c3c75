"""`worldvln-edge ros` as its users see it."""

import os
import signal
import time

import pytest
from click.testing import CliRunner

pytest.importorskip("cyclonedds", reason="needs the extra dds")
pytest.importorskip("starlette", reason="flies against a server, which needs the extra serve")

from bridge_processes import bridge_processes

from worldvln_edge.cli import main
from worldvln_edge.ros_bridge.bench.desk_drone import DeskDrone
from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig


@pytest.mark.parametrize("command", ["run", "setpoints", "policy", "bench"])
def test_help_has_an_example(command):
    result = CliRunner().invoke(main, ["ros", command, "--help"])
    assert result.exit_code == 0
    assert f"Example: worldvln-edge ros {command}" in result.output


def _config(tmp_path, more: str = "") -> str:
    path = tmp_path / "drone.toml"
    path.write_text("[limits]\ngeofence_min_m = [-20, -20, 0]\ngeofence_max_m = [20, 20, 10]\n" + more)
    return str(path)


def test_a_wrong_configuration_is_one_line_and_nothing_starts(tmp_path):
    config = _config(tmp_path, "[camra]\n")
    result = CliRunner().invoke(main, ["ros", "run", "--via", "dds", "--config", config])
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {config}: Object contains unknown field `camra`")


def test_a_network_interface_that_is_not_there_is_named(tmp_path):
    config = _config(tmp_path, '[dds]\ndomain_id = 211\nnetwork_interface = "nowhere0"\n')
    arguments = ["ros", "setpoints", "--via", "dds", "--config", config, "--socket", str(tmp_path / "line.sock")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "error: DDS domain 211 cannot be joined over nowhere0" in result.output
    assert "check dds.network_interface and dds.domain_id" in result.output
    assert not (tmp_path / "line.sock").exists()


def test_a_policy_without_a_setpoint_process_says_what_to_start(tmp_path):
    arguments = ["ros", "policy", "--via", "dds", "--config", _config(tmp_path), "--socket", str(tmp_path / "no.sock")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "no setpoint process listens here" in result.output


def test_run_starts_a_policy_again_that_was_killed_and_ends_both_on_a_signal(tmp_path):
    with bridge_processes(tmp_path) as bridge:
        bridge.start("server")
        run = bridge.start("run")
        with DeskDrone(DdsConfig(domain_id=bridge.domain_id, network_interface="lo"), TopicsConfig()) as drone:
            drone.fly("Fly ahead.")
            children = [int(line) for line in _children(run.pid)]
            policy = next(child for child in children if "\0policy\0" in _command_line(child))
            os.kill(policy, signal.SIGKILL)
            drone.wait(lambda: bridge.log("run").count("a policy has connected") >= 2, what="another policy")
            drone.fly("Fly on.")
            run.send_signal(signal.SIGTERM)
            assert run.wait(10) == 0
            ended_s = time.monotonic() + 0.5  # what was on its way may still arrive
            time.sleep(1.0)
            assert drone.setpoints[-1].at_s < ended_s


def _children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return children.read().split()


def _command_line(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as command:
        return command.read()
