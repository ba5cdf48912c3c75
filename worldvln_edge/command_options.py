"""Command-line options that several commands share, so that they are spelled and explained alike.

Options whose meaning differs from one command to the next are functions of what `--help` says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Option = Callable[[Any], Any]
"""A decorator of a command."""
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

# Spelled out, because `backends.BACKENDS` comes with the engines, which `--help` does not need.
backend_option: Option = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the graphs; auto: TensorRT engines of the bundle that fit this GPU, else CUDA, else the CPU.",
)
own_profiles_option: Option = click.option(
    "--profiles", "profile_file", type=_EXISTING_FILE, help="JSON file with profiles of your own (docs/runtime.md)."
)
also_option: Option = click.option(
    "--also",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another export of the same checkpoint, for profiles that name its precision; may be repeated.",
)
ca_file_option: Option = click.option(
    "--ca-file",
    type=_EXISTING_FILE,
    help="PEM file with the authorities to trust behind wss://.  [default: those of this system]",
)


def threads_option(help: str = "CPU threads; 0: all cores.") -> Option:
    """`--threads`, 0 by default."""
    return click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help=help)


def seed_option(help: str = "Of the policy's draws.") -> Option:
    """`--seed`, 0 by default."""
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help=help)


def json_option(help: str = "Print the report as JSON.") -> Option:
    """`--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def held_out_tasks_option(help: str, *, least: int = 1) -> Option:
    """`--tasks`, a number of held-out tasks."""
    return click.option("--tasks", type=click.IntRange(min=least), default=108, show_default=True, help=help)


def key_file_option(help: str) -> Option:
    """`--key-file`, the API keys that a server takes or a client has."""
    return click.option("--key-file", type=_EXISTING_FILE, help=f"API keys, one a line; {help}.")
