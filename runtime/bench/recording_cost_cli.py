"""`worldvln-edge bench-record`: what recording costs a flight of a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import backend_option, json_option, threads_option
from worldvln_edge.runtime.bench.bench_cli import parse_frame_size

if TYPE_CHECKING:
    from worldvln_edge.runtime.bench.recording_cost import RecordingCost
    from worldvln_edge.runtime.engines.backends import BackendName


@click.command("bench-record")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--pairs", type=click.IntRange(min=1), default=20, show_default=True, help="Flights of each kind.")
@click.option(
    "--frame-size",
    "frame_hw",
    metavar="WIDTHxHEIGHT",
    default="640x480",
    show_default=True,
    callback=lambda context, parameter, value: parse_frame_size(value),
    help="JPEG frames of the camera.",
)
@backend_option
@threads_option()
@json_option()
def bench_record_command(
    bundle: Path, pairs: int, frame_hw: tuple[int, int], backend: BackendName, threads: int, as_json: bool
) -> None:
    """Fly BUNDLE with and without a recorder, alternately, and print what a segment takes.

    Example: worldvln-edge bench-record bundle/ --pairs 40
    """
    # Imported here so that `worldvln-edge bench-record --help` needs no engine.
    import msgspec

    from worldvln_edge.runtime.bench.recording_cost import RecordingCostConfig, measure_recording

    config = RecordingCostConfig(pairs=pairs, frame_hw=frame_hw, backend=backend, threads=threads)
    with click.progressbar(length=2 * pairs, label="flights", file=sys.stderr) as progress:
        cost = measure_recording(bundle, config, on_flight=lambda: progress.update(1))
    click.echo(msgspec.json.encode(cost) if as_json else recording_cost_table(cost))


def recording_cost_table(cost: RecordingCost) -> str:
    """The medians for a terminal."""
    lines = [f"{'milliseconds per segment':<26}{'plain':>10}{'recorded':>10}{'added':>9}"]
    for name, plain, recorded, share in (
        ("wall time", cost.wall_ms, cost.recorded_wall_ms, cost.wall_share),
        ("processor time", cost.cpu_ms, cost.recorded_cpu_ms, cost.cpu_share),
    ):
        lines.append(f"{name:<26}{median(plain):>10.2f}{median(recorded):>10.2f}{share:>9.2%}")
    lines.append("")
    lines.append(
        f"medians of {len(cost.wall_ms)} pairs of flights; added: the median over pairs. "
        f"{cost.bytes_per_segment / 1e3:.0f} kB were written for a segment, {cost.lost_frames} frames were lost."
    )
    return "\n".join(lines)
