"""`worldvln-edge serve`: a bundle on a port."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import (
    also_option,
    backend_option,
    key_file_option,
    own_profiles_option,
    threads_option,
)
from worldvln_edge.runtime.doors.zmq_option import zmq_config, zmq_options

if TYPE_CHECKING:
    from worldvln_edge.runtime.doors.server_log import LogFormat
    from worldvln_edge.runtime.engines.backends import BackendName
    from worldvln_edge.runtime.sessions.session_events import SessionWatcher


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as (host, port).

    Raises:
        click.BadParameter: anything else.
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, for example 127.0.0.1:8001 or [::1]:8001")
    return host, int(port)


def _read_address(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    return None if value is None else parse_address(value)


@click.command("serve")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--ws",
    metavar="HOST:PORT",
    callback=_read_address,
    show_default="127.0.0.1:8001",
    help="WebSocket (native and openpi), and HTTP unless --http says where; port 0 takes a free one.",
)
@click.option(
    "--http",
    metavar="HOST:PORT",
    callback=_read_address,
    show_default="as --ws",
    help="HTTP API, and WebSocket unless --ws says where.",
)
@click.option(
    "--reset-on-one-frame/--no-reset-on-one-frame",
    default=True,
    show_default=True,
    help="HTTP API: a prompt with exactly one image starts its session afresh, as the research service does.",
)
@zmq_options
@key_file_option("clients send one of them")
@click.option(
    "--tls-cert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Certificate of this server (PEM): HTTP and WebSocket are encrypted; https:// and wss:// only.",
)
@click.option(
    "--tls-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its private key (PEM, mode 0600).",
)
@click.option(
    "--max-requests-per-s",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default="no limit",
    help="Of one key, or of one address where no keys are used; beyond it clients hear `busy`.",
)
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine without a key.")
@backend_option
@threads_option()
@click.option(
    "--session-memory-mb",
    type=click.FloatRange(min=0),
    show_default="half of the available memory",
    help="That all sessions together may hold; one that would not fit is refused.",
)
@click.option(
    "--profile",
    default="exact",
    show_default=True,
    help="Generation profile: exact, balanced, fast or one of --profiles.",
)
@own_profiles_option
@also_option
@click.option(
    "--envelope",
    "envelope_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with the limits of what may be flown (docs/operations.md); beyond them the answer is a hold.",
)
@click.option(
    "--settled",
    type=(click.IntRange(min=1), click.FloatRange(min=0, min_open=True), click.FloatRange(min=0, min_open=True)),
    metavar="STEPS CM DEG",
    default=(10, 3.0, 1.0),
    show_default=True,
    help="When a chained session has settled: so many steps in a row, each shorter than CM and turning less than DEG.",
)
@click.option(
    "--journal",
    "journal_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep sessions in this folder until they end: after a crash, clients resume where they were.",
)
@click.option(
    "--journal-mb",
    type=click.FloatRange(min=1),
    default=2000.0,
    show_default=True,
    help="Of all journals together; beyond it, the one that was not written for the longest time goes.",
)
@click.option(
    "--record",
    "record_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Record every session into this folder, as MCAP files that Foxglove opens (docs/recording.md).",
)
@click.option(
    "--record-predicted",
    is_flag=True,
    help="Record the frames that the policy predicts, too; they are decoded while nobody else wants the device.",
)
@click.option(
    "--record-part-mb",
    type=click.FloatRange(min=1),
    default=500.0,
    show_default=True,
    help="A recording that is larger goes on in another file.",
)
@click.option(
    "--rerun",
    "rerun_url",
    metavar="URL",
    help="Show sessions in a Rerun viewer while they fly, such as rerun+http://ground:9876/proxy.",
)
@click.option(
    "--speculate",
    is_flag=True,
    help="Generate the next segment while one is flown, and take it if the frames come as predicted.",
)
@click.option(
    "--speculate-threshold",
    type=click.FloatRange(0, 1),
    default=0.7,
    show_default=True,
    help="Share of the frames' bit labels that must come as predicted.",
)
@click.option(
    "--dashboard",
    is_flag=True,
    help="Show flights at http://HOST:PORT/dashboard, and let whoever has a key hold them.",
)
@click.option(
    "--otel",
    is_flag=True,
    help="Send a trace of every answer to an OpenTelemetry collector, which OTEL_EXPORTER_OTLP_ENDPOINT names.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="info logs every segment and refusal.",
)
def serve_command(
    bundle: Path,
    ws: tuple[str, int] | None,
    http: tuple[str, int] | None,
    zmq_endpoints: tuple[str, ...],
    zmq_key_file: Path | None,
    zmq_clients: Path | None,
    zmq_ipc_mode: int,
    reset_on_one_frame: bool,
    key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    max_requests_per_s: float,
    allow_remote: bool,
    backend: BackendName,
    threads: int,
    session_memory_mb: float | None,
    profile: str,
    profile_file: Path | None,
    envelope_file: Path | None,
    settled: tuple[int, float, float],
    journal_folder: Path | None,
    journal_mb: float,
    record_folder: Path | None,
    record_predicted: bool,
    record_part_mb: float,
    rerun_url: str | None,
    also: tuple[Path, ...],
    speculate: bool,
    speculate_threshold: float,
    dashboard: bool,
    otel: bool,
    log_format: LogFormat,
    log_level: str,
) -> None:
    """Serve BUNDLE to drones, simulators and ROS bridges until SIGTERM.

    The HTTP API, the native WebSocket and openpi's protocol share one port unless --ws and --http differ.

    Example: worldvln-edge serve bundle/ --ws 0.0.0.0:8001 --key-file keys.txt

    Example: worldvln-edge serve bundle/ --ws 0.0.0.0:8001 --key-file keys.txt --tls-cert cert.pem --tls-key key.pem

    Example: worldvln-edge serve bundle/ --zmq ipc:///run/worldvln/session.sock --ws 127.0.0.1:8001
    """
    # Imported here so that `worldvln-edge serve --help` needs neither the server nor the engines.
    from worldvln_edge.generation_profile import read_profiles
    from worldvln_edge.protocol import Limits
    from worldvln_edge.runtime.doors.access import read_key_file
    from worldvln_edge.runtime.doors.listen_address import check_address
    from worldvln_edge.runtime.doors.server import DEFAULT_HOST, DEFAULT_PORT, serve
    from worldvln_edge.runtime.doors.server_log import configure_log
    from worldvln_edge.runtime.doors.systemd_watchdog import SystemdNotifier
    from worldvln_edge.runtime.doors.tls import context_of_options
    from worldvln_edge.runtime.doors.zmq_config import check_endpoints
    from worldvln_edge.runtime.sessions.chained_session import SettledRule
    from worldvln_edge.runtime.sessions.envelope import read_envelope
    from worldvln_edge.runtime.sessions.session_journal import SessionJournal
    from worldvln_edge.runtime.sessions.tracing import open_tracing
    from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
    from worldvln_edge.runtime.worldvln.worldvln_policy import PREVIEW_GRAPHS, load_policy

    logging.getLogger("worldvln_edge.runtime.engines.backends").setLevel(logging.INFO)  # says what was chosen, and why
    keys = read_key_file(key_file) if key_file is not None else ()
    configure_log(log_format, log_level, secrets=keys)
    zmq = zmq_config(zmq_endpoints, zmq_key_file, zmq_clients, zmq_ipc_mode)
    host: str | None
    host, port = ws or http or ((None, 0) if zmq else (DEFAULT_HOST, DEFAULT_PORT))
    for address in filter(None, {host, http[0] if http else None}):  # before the engines load, which takes a while
        check_address(address, keys=keys, allow_remote=allow_remote)
    tls = context_of_options(tls_cert, tls_key, has_port=host is not None)
    if zmq is not None:
        check_endpoints(zmq, has_api_keys=bool(keys), allow_remote=allow_remote)
    profiles = read_profiles(profile_file) if profile_file is not None else None
    envelope = read_envelope(envelope_file) if envelope_file is not None else None
    journal = None
    if journal_folder is not None:
        journal = SessionJournal(journal_folder, max_bytes=round(journal_mb * 1e6), ttl_s=Limits().session_ttl_s)
    if record_predicted and record_folder is None:
        raise click.UsageError("--record-predicted needs --record FOLDER")
    if record_folder is not None:
        from worldvln_edge.runtime.recording.recorded_policy import settings_of
        from worldvln_edge.runtime.recording.recorder import Recorder, RecorderConfig, prepare_folder

        prepare_folder(record_folder)
    with ExitStack() as until_end:
        meters = (until_end.enter_context(open_tracing()),) if otel else ()
        policy = load_policy(
            bundle,
            backend=backend,
            threads=threads,
            profiles=profiles,
            profile=profile,
            speculation=SpeculationConfig(threshold=speculate_threshold) if speculate else None,
            also=also,
            side_graphs=PREVIEW_GRAPHS if record_predicted or dashboard else (),
        )
        until_end.callback(policy.close)
        recorder = None
        if record_folder is not None:
            recorder = Recorder(
                record_folder,
                policy.info,
                settings_of(policy, threads=threads),
                config=RecorderConfig(part_bytes=round(record_part_mb * 1e6)),
            )
            until_end.callback(recorder.close)
        watchers: list[SessionWatcher] = []
        if rerun_url is not None:
            from worldvln_edge.runtime.recording.rerun_watcher import RerunWatcher

            viewer = RerunWatcher(policy.info, connect=rerun_url)
            until_end.callback(viewer.close)
            watchers.append(viewer.watch)
        serve(
            policy,
            host,
            port,
            http_address=http if ws else None,
            zmq=zmq,
            tls=tls,
            resets_on_one_frame=reset_on_one_frame,
            keys=keys,
            allow_remote=allow_remote,
            limits=Limits(max_requests_per_s=max_requests_per_s),
            session_memory_bytes=None if session_memory_mb is None else round(session_memory_mb * 1e6),
            envelope=envelope,
            settled=SettledRule(steps=settled[0], cm=settled[1], deg=settled[2]),
            journal=journal,
            meters=meters,
            recorder=recorder,
            watchers=watchers,
            tells_predictions=record_predicted,
            dashboard=dashboard,
            systemd=SystemdNotifier.from_environment(),
            on_ready=lambda url: click.echo(f"{policy.info.name} is ready at {url}", err=True),
        )
