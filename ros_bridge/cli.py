"""`worldvln-edge ros`: the bridge's processes."""

from __future__ import annotations

import logging
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from worldvln_edge.command_options import json_option, threads_option
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
@click.option("--parent", type=int, hidden=True, help="Process that started this one: it ends with that.")
def setpoints_command(via: str, config_file: Path, socket_path: Path, parent: int | None) -> None:
    """The setpoint process alone: the only one that moves the drone.

    Example: worldvln-edge ros setpoints --via dds --config drone.toml --socket /run/worldvln/setpoints.sock
    """
    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
    from worldvln_edge.ros_bridge.ports.opening import open_port
    from worldvln_edge.ros_bridge.setpoints.policy_link import LinkListener
    from worldvln_edge.ros_bridge.setpoints.punctuality import become_punctual
    from worldvln_edge.ros_bridge.setpoints.setpoint_choice import setpoint_process
    from worldvln_edge.ros_bridge.supervisor import end_with_parent

    config = read_bridge_config(config_file)
    _log_to_stderr("setpoints")
    become_punctual(config.setpoint.realtime_priority)
    listener = LinkListener(socket_path)
    try:
        port = open_port(via, config, name="worldvln_setpoints")
        try:
            process = setpoint_process(config, port, listener)
            _stop_on_signals(process.stop)
            if parent is not None:
                end_with_parent(parent, process.stop)
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
    from worldvln_edge.ros_bridge.ports.message_port import MessagePort
    from worldvln_edge.ros_bridge.ports.opening import goals_served, open_wire
    from worldvln_edge.ros_bridge.server_connection import server_client
    from worldvln_edge.ros_bridge.setpoints.policy_link import PolicyLink

    config = read_bridge_config(config_file)
    _log_to_stderr("policy")
    link = PolicyLink(socket_path)
    try:
        wire = open_wire(via, config, name="worldvln_policy")
        port = MessagePort(wire, config.topics)
        try:
            new_client = server_client(config.server)
            heartbeat = PolicyHeartbeat(link, new_client)
            node = PolicyNode(config, port, link, new_client)
            _stop_on_signals(node.stop)
            if not config.topics.lockstep:  # there no time goes by without word from the policy
                heartbeat.start()
            try:
                with goals_served(wire, node.request):
                    node.run()
            finally:
                heartbeat.stop()
        finally:
            port.close()
    finally:
        link.close()


@ros.command("simulate")
@_via
@_config
@click.option(
    "--simulator",
    "simulator_url",
    default="http://127.0.0.1:8765",
    show_default=True,
    help="Of `worldvln-edge sim serve`.",
)
@click.option(
    "--tasks",
    "task_file",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="JSON list of `worldvln-edge sim tasks`, or a folder of task files; flown in order.",
)
@click.option("--count", type=click.IntRange(min=1), help="Fly so many tasks.  [default: all]")
@click.option("--image-size", type=click.IntRange(8, 1024), default=256, show_default=True, help="Of the camera.")
@click.option(
    "--wait",
    "waits",
    is_flag=True,
    help="Say no instructions: stand at the first task's start, fly what others say, until SIGTERM.",
)
@json_option()
def simulate_command(
    via: str,
    config_file: Path,
    simulator_url: str,
    task_file: Path,
    count: int | None,
    image_size: int,
    waits: bool,
    as_json: bool,
) -> None:
    """Be the drone: camera and odometry from the simulator, setpoints flown; says the tasks' instructions.

    Needs `ros run` with the same configuration beside it. With topics.use_sim_time and topics.lockstep the world has
    its own /clock and waits for the policy, however long it takes; without them it runs in real time.

    Example: worldvln-edge ros simulate --via dds --config desk.toml --tasks tasks.json
    """
    import msgspec

    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
    from worldvln_edge.ros_bridge.ports.opening import open_wire
    from worldvln_edge.ros_bridge.simulation.simulated_flights import flight_line
    from worldvln_edge.ros_bridge.simulation.simulator_node import SimulatorNode
    from worldvln_edge.ros_bridge.simulation.world import WorldStoppedError
    from worldvln_edge.tasks import read_task_list

    config = read_bridge_config(config_file)
    _log_to_stderr("simulator")
    tasks = read_task_list(task_file)[:count]
    wire = open_wire(via, config, name="worldvln_simulator")
    try:
        node = SimulatorNode(config, wire, simulator_url, (image_size, image_size))
        _stop_on_signals(node.stop)
        flights = []
        try:
            if waits:
                node.wait(tasks[0])
            for task in tasks:
                flights.append(node.fly(task))
                click.echo(flight_line(flights[-1]), err=as_json)
        except WorldStoppedError:
            click.echo("stopped", err=True)
        finally:
            node.close()
    finally:
        wire.close()
    if as_json:
        click.echo(msgspec.json.encode(flights).decode())
    elif flights:
        flown_s, wall_s = sum(flight.flown_s for flight in flights), sum(flight.wall_s for flight in flights)
        succeeded = sum(flight.success is True for flight in flights)
        click.echo(f"{succeeded} of {len(flights)} succeeded; real-time factor {flown_s / wall_s:.2f}")


@ros.command("record")
@_via
@_config
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the bag; must not exist yet.")
@click.option("--without-images", is_flag=True, help="Leave the camera out.")
@click.option(
    "--max-bag-size",
    type=click.IntRange(min=0),
    metavar="BYTES",
    default=0,
    show_default=True,
    help="Begin another file when one has reached it; 0: one file.",
)
def record_command(via: str, config_file: Path, out: Path, without_images: bool, max_bag_size: int) -> None:
    """Record the topics of the configuration as a rosbag2 folder (MCAP), until SIGINT or SIGTERM.

    A process of its own, beside `ros run`. With ROS 1 use `rosbag record`.

    Example: worldvln-edge ros record --via dds --config drone.toml --out bags/flight1
    """
    from worldvln_edge.ros_bridge.bridge_config import read_bridge_config
    from worldvln_edge.ros_bridge.ports.opening import open_wire
    from worldvln_edge.ros_bridge.recording.cdr import cdr_encoder
    from worldvln_edge.ros_bridge.recording.rosbag_writer import RosbagWriter
    from worldvln_edge.ros_bridge.recording.topic_recorder import TopicRecorder

    config = read_bridge_config(config_file)
    to_cdr = cdr_encoder(via)
    _log_to_stderr("record")
    wire = open_wire(via, config, name="worldvln_recorder")
    try:
        bag = RosbagWriter(out, max_file_bytes=max_bag_size)
        recorder = TopicRecorder(wire, config.topics, to_cdr, bag, without_images=without_images)
        _stop_on_signals(recorder.stop)
        click.echo(f"recording to {out}", err=True)
        recorder.run()
    finally:
        wire.close()
    click.echo(f"{out}: {bag.messages} messages, {recorder.dropped} dropped")


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
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Serve it, and fly with the real policy process.  [default: a stand-in without a model]",
)
@threads_option("CPU threads of the server; 0: all cores.")
@json_option()
def bench_command(
    rate_hz: float,
    seconds: float,
    repetitions: int,
    busy_processes: int,
    realtime_priority: int,
    bundle: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Measure setpoints over DDS on this machine: punctuality, and holds when the policy is killed or stopped.

    Example: worldvln-edge ros bench --busy 2

    Example: worldvln-edge ros bench --bundle bundle/ --realtime-priority 50
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
            bundle=bundle,
            threads=threads,
            domain_id=free_domain_id(),
        )
    click.echo(msgspec.json.encode(figures).decode() if as_json else "\n".join(table_lines(figures)))


def _stop_on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop())


def _log_to_stderr(process: str) -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {process}: %(message)s")
