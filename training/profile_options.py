"""Options of the commands that fly a bundle with a generation profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from worldvln_edge.generation_profile import GenerationProfile

profile_option = click.option(
    "--profile", metavar="NAME", help="Generation profile of --bundle: exact, balanced, fast or one of --profiles."
)


def own_profiles(profile_file: Path | None) -> dict[str, GenerationProfile]:
    """Profiles of `--profiles`, none without it. Raises ConfigError, see `read_profiles`."""
    if profile_file is None:
        return {}
    from worldvln_edge.generation_profile import read_profiles

    return read_profiles(profile_file)


def refuse_without_bundle(
    bundle: Path | None, profile: str | None, profile_file: Path | None, also: tuple[Path, ...]
) -> None:
    """Raise click.UsageError when a server that runs already is told how to fly."""
    if bundle is None and (profile is not None or profile_file is not None or also):
        raise click.UsageError(
            "--profile, --profiles and --also say how --bundle is flown; a server flies as it was started: "
            "worldvln-edge serve BUNDLE --profile NAME"
        )
