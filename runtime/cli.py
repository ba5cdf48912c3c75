"""`worldvln-edge serve`: a bundle on a port."""

from __future__ import annotations

import logging
from pathlib import Path

import click


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


@click.command("serve")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--ws",
    "address",
    metavar="HOST:PORT",
    default="127.0.0.1:8001",
    show_default=True,
    callback=lambda context, parameter, value: parse_address(value),
    help="Listen here (WebSocket and HTTP); port 0 takes a free one.",
)
@click.option(
    "--key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="API keys, one a line; clients send one of them.",
)
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="CPU threads; 0: all cores.")
@click.option(
    "--profile",
    default="exact",
    show_default=True,
    help="Generation profile: exact, balanced, fast or one of --profiles.",
)
@click.option(
    "--profiles",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with profiles of your own (docs/runtime.md).",
)
def serve_command(
    bundle: Path,
    address: tuple[str, int],
    key_file: Path | None,
    allow_remote: bool,
    threads: int,
    profile: str,
    profile_file: Path | None,
) -> None:
    """Serve BUNDLE to drones, simulators and ROS bridges until SIGTERM.

    Example: worldvln-edge serve bundle/ --ws 0.0.0.0:8001 --key-file keys.txt
    """
    # Imported here so that `worldvln-edge serve --help` needs neither the server nor the engines.
    from worldvln_edge.generation_profile import read_profiles
    from worldvln_edge.runtime.access import read_key_file
    from worldvln_edge.runtime.server import check_address, serve
    from worldvln_edge.runtime.worldvln_policy import load_policy

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host, port = address
    keys = read_key_file(key_file) if key_file is not None else ()
    check_address(host, keys=keys, allow_remote=allow_remote)  # before the engines load, which takes a while
    profiles = read_profiles(profile_file) if profile_file is not None else None
    policy = load_policy(bundle, threads=threads, profiles=profiles, profile=profile)
    serve(
        policy,
        host,
        port,
        keys=keys,
        allow_remote=allow_remote,
        on_ready=lambda url: click.echo(f"{policy.info.name} is ready at {url}", err=True),
    )
