"""Options of `worldvln-edge serve` for ZeroMQ, and what they mean together.

Source: spec/session_protocol.md 7 (transports), 7.6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from worldvln_edge.runtime.doors.zmq_config import ZmqConfig  # needs pyzmq


class ZmqOptionError(ValueError):
    """Options that make no sense without another one."""


def _read_mode(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{value!r} is no file mode, for example 0600 or 0660")
    return mode


def zmq_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command gets `zmq_endpoints`, `zmq_key_file`, `zmq_clients` and `zmq_ipc_mode`."""
    options = (
        click.option(
            "--zmq",
            "zmq_endpoints",
            metavar="ENDPOINT",
            multiple=True,
            help="ZeroMQ at tcp://HOST:PORT or ipc:///PATH; may be repeated. Without --ws and --http, nothing else.",
        ),
        click.option(
            "--zmq-key-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="The server's CURVE keys, NAME.key_secret of `worldvln-edge keygen`: ZeroMQ is encrypted.",
        ),
        click.option(
            "--zmq-clients",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder with the NAME.key files of clients that may connect; without it, everyone with an API key.",
        ),
        click.option(
            "--zmq-ipc-mode",
            metavar="MODE",
            default="0600",
            show_default=True,
            callback=_read_mode,
            help="Permissions of ipc socket files: who on this machine may connect.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def zmq_config(
    endpoints: tuple[str, ...], key_file: Path | None, clients: Path | None, ipc_mode: int
) -> ZmqConfig | None:
    """What the options say; None when ZeroMQ is not served.

    Raises:
        ZmqOptionError: keys without an endpoint, clients without the server's keys.
        CurveKeyError: a key cannot be read.
    """
    if clients is not None and key_file is None:
        raise ZmqOptionError("--zmq-clients needs the server's own keys: give --zmq-key-file NAME.key_secret too")
    if not endpoints:
        if key_file is not None:
            raise ZmqOptionError("--zmq-key-file needs an address: give --zmq tcp://HOST:PORT or ipc:///PATH too")
        return None
    # Imported here because a server without ZeroMQ, and --help, need no pyzmq.
    from worldvln_edge.curve_keys import read_key_pair, read_public_keys
    from worldvln_edge.runtime.doors.zmq_config import ZmqConfig

    return ZmqConfig(
        endpoints=endpoints,
        server_keys=None if key_file is None else read_key_pair(key_file),
        client_keys=None if clients is None else read_public_keys(clients),
        ipc_mode=ipc_mode,
    )
