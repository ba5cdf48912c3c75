"""`worldvln-edge tune`: measure every profile of a bundle on this machine, so that deadlines can choose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import also_option, backend_option, json_option, own_profiles_option, threads_option

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName
    from worldvln_edge.runtime.worldvln.latency_model import LatencyModel


@click.command("tune")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@backend_option
@threads_option("As you will serve with.")
@click.option("--flights", type=click.IntRange(min=1), default=5, show_default=True, help="Flights per profile.")
@own_profiles_option
@also_option
@json_option("Print the measured times as JSON.")
def tune_command(
    bundle: Path,
    backend: BackendName,
    threads: int,
    flights: int,
    profile_file: Path | None,
    also: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure how long every profile of BUNDLE takes on this machine and keep it in the bundle.

    A server that finds these times chooses the deepest profile that fits a request's deadline_ms.

    Example: worldvln-edge tune bundle/ --threads 2
    """
    # Imported here so that `worldvln-edge tune --help` needs no engine.
    import msgspec

    from worldvln_edge.bundle import Bundle
    from worldvln_edge.generation_profile import model_profiles, read_profiles
    from worldvln_edge.runtime.bench.tune import tune_bundle

    profiles = read_profiles(profile_file) if profile_file is not None else {}
    total = (flights + 1) * len(model_profiles(Bundle.open_manifest(bundle).model, profiles))
    with click.progressbar(length=total, label="flights", file=sys.stderr) as progress:
        model, path = tune_bundle(
            bundle,
            backend=backend,
            threads=threads,
            flights=flights,
            profiles=profiles,
            also=also,
            on_flight=lambda: progress.update(1),
        )
    click.echo(msgspec.json.encode(model) if as_json else tune_table(model))
    click.echo(f"written to {path}", err=True)


def tune_table(model: LatencyModel) -> str:
    """The times for a terminal, and how they compare with the first profile's."""
    lines = [model.device, "", f"{'profile':<16}{'ms per segment (p95, each segment)':<44}{'times faster':>14}"]
    deepest = sum(model.profiles[0].segment_s)
    for entry in model.profiles:
        times = " ".join(f"{seconds * 1e3:.1f}" for seconds in entry.segment_s)
        lines.append(f"{entry.profile.name:<16}{times:<44}{deepest / sum(entry.segment_s):>14.2f}")
    return "\n".join(lines)
