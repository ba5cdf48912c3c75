"""Options of the commands that fly with generation profiles of the user's own."""

from __future__ import annotations

from pathlib import Path

import click

own_profiles_option = click.option(
    "--profiles",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with profiles of your own (docs/runtime.md).",
)
also_option = click.option(
    "--also",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another export of the same checkpoint, for profiles that name its precision; may be repeated.",
)
