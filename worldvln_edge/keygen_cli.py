"""`worldvln-edge keygen`: CURVE keys for ZeroMQ servers and clients."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("keygen")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Folder for the files; default: here.",
)
def keygen_command(names: tuple[str, ...], folder: Path) -> None:
    """Make a CURVE key pair for each NAME: NAME.key (public) and NAME.key_secret (mode 0600).

    Each machine keeps its own NAME.key_secret. The server gets the clients' NAME.key files, the clients the server's.

    Example: worldvln-edge keygen server drone-1 --out keys/
    """
    from worldvln_edge.curve_keys import PUBLIC_SUFFIX, SECRET_SUFFIX, write_key_pair  # needs pyzmq

    for name in names:
        pair = write_key_pair(folder, name)
        secret, public = folder / f"{name}{SECRET_SUFFIX}", folder / f"{name}{PUBLIC_SUFFIX}"
        click.echo(f"{public}: {pair.public.decode()}")
        click.echo(f"{secret} is secret; leave it on the machine of {name}", err=True)
