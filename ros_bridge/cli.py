"""`worldvln-edge ros`: the bridge's processes."""

from __future__ import annotations

import logging
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from worldvln_edge.command_options import json_option
from worldvln_edge.ros_bridge.ports.opening import WAYS

_via = click.option("--via", type=click.Choice(WAYS), required=True, help="Way to the robot's topics.")
_config = click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="TOML file (docs/ros.md).",
)
_socket = click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the two processes meet: a Unix socket in a folder of your own.",
)


@click.group("ros")
def ros() -> None:
    """Fly a robot by its topics: frames in, setpoints out.

    Example: worldvln-edge ros run --via dds --config drone.toml
    """


@ros.command("run")
@_via
@_config
def run_command(via: str, config_file: Path) -> None:
    """Start the setpoint process and the policy process, and start the policy again when it dies.

    Example: worldvln-edge ros run --via dds --config drone.toml
    """
    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
    from worldvln_edge.ros_bridge.supervisor import Supervisor

    read_bridge_config(config_file)  # what is wrong with it is said once, before anything starts
    _log_to_stderr("ros run")
    with tempfile.TemporaryDirectory(prefix="worldvln-ros-") as folder:
        supervisor = Supervisor(via, config_file, Path(folder) / "setpoints.sock")
        _stop_on_signals(supervisor.stop)
        supervisor.run()


@ros.command("setpoints")
@_via
@_config
@_socket
def setpoints_command(via: str, config_file: Path, socket_path: Path) -> None:
    """The setpoint process alone: the only one that moves the drone.

    Example: worldvln-edge ros setpoints --via dds --config drone.toml --socket /run/worldvln/setpoints.sock
    """
    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
    from worldvln_edge.ros_bridge.ports.opening import open_port
    from worldvln_edge.ros_bridge.setpoints.policy_link import LinkListener
    from worldvln_edge.ros_bridge.setpoints.punctuality import become_punctual
    from worldvln_edge.ros_bridge.setpoints.setpoint_logic import SetpointLogic
    from worldvln_edge.ros_bridge.setpoints.setpoint_process import SetpointProcess

    config = read_bridge_config(config_file)
    _log_to_stderr("setpoints")
    become_punctual(config.setpoint.realtime_priority)
    listener = LinkListener(socket_path)
    try:
        port = open_port(via, config)
        try:
            process = SetpointProcess(SetpointLogic(config.setpoint, config.limits, config.odometry), port, listener)
            _stop_on_signals(process.stop)
            process.run()
        finally:
            port.close()
    finally:
        listener.close()


@ros.command("policy")
@_via
@_config
@_socket
def policy_command(via: str, config_file: Path, socket_path: Path) -> None:
    """The policy process alone: frames to the server, action chunks to the setpoint process.

    Example: worldvln-edge ros policy --via dds --config drone.toml --socket /run/worldvln/setpoints.sock
    """
    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
    from worldvln_edge.ros_bridge.policy_heartbeat import PolicyHeartbeat
    from worldvln_edge.ros_bridge.policy_node import PolicyNode
    from worldvln_edge.ros_bridge.ports.opening import open_port
    from worldvln_edge.ros_bridge.server_connection import server_client
    from worldvln_edge.ros_bridge.setpoints.policy_link import PolicyLink

    config = read_bridge_config(config_file)
    _log_to_stderr("policy")
    link = PolicyLink(socket_path)
    try:
        port = open_port(via, config)
        try:
            new_client = server_client(config.server)
            heartbeat = PolicyHeartbeat(link, new_client)
            node = PolicyNode(config, port, link, new_client)
            _stop_on_signals(node.stop)
            heartbeat.start()
            try:
                node.run()
            finally:
                heartbeat.stop()
        finally:
            port.close()
    finally:
        link.close()


@ros.command("bench")
@click.option("--rate", "rate_hz", type=float, default=20.0, show_default=True, help="Setpoints a second, 20 to 50.")
@click.option("--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Undisturbed flight.")
@click.option("--repetitions", type=click.IntRange(min=1), default=10, show_default=True, help="Of each fault.")
@click.option(
    "--busy",
    "busy_processes",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that compute all the while, in place of inference.",
)
@click.option(
    "--realtime-priority",
    type=click.IntRange(0, 99),
    default=0,
    show_default=True,
    help="Of the setpoint process (SCHED_FIFO); 0: none.",
)
@json_option()
def bench_command(
    rate_hz: float, seconds: float, repetitions: int, busy_processes: int, realtime_priority: int, as_json: bool
) -> None:
    """Measure setpoints over DDS on this machine: punctuality, and holds when the policy is killed or stopped.

    Example: worldvln-edge ros bench --busy 2
    """
    import msgspec

    from worldvln_edge.ros_bridge.bench.fail_safe_bench import free_domain_id, run_fail_safe_bench, table_lines
    from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig

    setpoint = SetpointConfig(rate_hz=rate_hz, realtime_priority=realtime_priority)
    with tempfile.TemporaryDirectory(prefix="worldvln-ros-bench-") as folder:
        figures = run_fail_safe_bench(
            Path(folder),
            setpoint=setpoint,
            seconds=seconds,
            repetitions=repetitions,
            busy_processes=busy_processes,
            domain_id=free_domain_id(),
        )
    click.echo(msgspec.json.encode(figures).decode() if as_json else "\n".join(table_lines(figures)))


def _stop_on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop())


def _log_to_stderr(process: str) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {process}: %(message)s")
