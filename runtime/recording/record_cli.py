"""`worldvln-edge record info`, `record show` and `replay`. Heavy imports happen inside the commands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from worldvln_edge.command_options import also_option, backend_option, json_option

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName
    from worldvln_edge.runtime.recording.recording_summary import RecordingSummary

_FILE = click.Path(path_type=Path)


@click.command("info")
@click.argument("file", type=_FILE)
@json_option("Print it as JSON.")
def info_command(file: Path, as_json: bool) -> None:
    """What is in the recording FILE, all its parts together; says when it was cut.

    Example: worldvln-edge record info recordings/20261121T235900.250Z-a3901555b1ae9325.000.mcap
    """
    from worldvln_edge.runtime.recording.recording_reader import Recording
    from worldvln_edge.runtime.recording.recording_summary import summarise

    summary = summarise(Recording(file))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode())
    else:
        for name, text in _rows(summary):
            click.echo(f"{name:<12} {text}")


def _rows(summary: RecordingSummary) -> list[tuple[str, str]]:
    opening, policy, settings = summary.opening, summary.opening.policy, summary.opening.settings
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(summary.began_ns / 1e9))
    speculation = settings.speculation_threshold
    rows = [
        ("files", f"{', '.join(summary.files)} ({summary.size_bytes / 1e6:.1f} MB)"),
        ("session", f"{opening.uid}, {began}, {summary.seconds:.1f} s, worldvln-edge {opening.software}"),
        (
            "policy",
            f"{policy.name} {policy.precision}, {policy.backend} on {policy.device}, weights {policy.weights[:12]}",
        ),
        (
            "settings",
            f"profile {settings.profile}, guidance {settings.guidance:g}, seed {opening.seed}, emit {opening.emit}, "
            f"speculation {'off' if speculation is None else f'from {speculation:g}'}",
        ),
        *(("instruction", text) for text in summary.instructions),
        ("frames", f"{_counts(summary.frames)} ({summary.picture_bytes / 1e6:.1f} MB)"),
        ("segments", f"{summary.segments} ({_counts(summary.profiles)}), {summary.late} late"),
        ("holds", _counts(summary.holds)),
        ("refusals", _counts(summary.refusals)),
    ]
    if opening.restored_frames:
        text = f"taken up from a journal, with {opening.restored_frames} frames and segment {opening.restored_emitted}"
        rows.insert(2, ("restored", text))
    if summary.median_ms is not None:
        rows.append(("answers", f"{summary.median_ms:.1f} ms median, {summary.max_ms:.1f} ms at most"))
    rows += [("gap", str(gap)) for gap in summary.gaps]
    if summary.closing is not None:
        rows.append(("end", summary.closing.reason))
    elif not summary.problems:
        rows.append(("end", "not recorded: the session flies, or the recording was stopped"))
    return rows + [("problem", text) for text in summary.problems]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


@click.command("show")
@click.argument("file", type=_FILE)
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write a Rerun file instead (.rrd).")
@click.option("--connect", metavar="URL", help="Send it to a viewer that runs, such as rerun+http://ground:9876/proxy.")
def show_command(file: Path, save: Path | None, connect: str | None) -> None:
    """Show the recording FILE in the Rerun viewer, which is started here unless --save or --connect is given.

    Example: worldvln-edge record show recordings/20261121T235900.250Z-a3901555b1ae9325.000.mcap --save flight.rrd
    """
    from worldvln_edge.runtime.recording.recording_reader import Recording
    from worldvln_edge.runtime.recording.rerun_stream import RerunStream

    if save is not None and connect is not None:
        raise click.UsageError("give --save or --connect, not both")
    recording = Recording(file)
    with RerunStream(recording.opening.uid, save=save, connect=connect) as stream:
        for timed in recording:
            stream.add(timed.message, timed.time_ns)
    for problem in recording.problems:
        click.echo(problem, err=True)


@click.command("replay")
@click.argument("file", type=_FILE)
@click.option("--bundle", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="Flown.")
@backend_option
@also_option
@click.option(
    "--within",
    type=(click.FloatRange(min=0), click.FloatRange(min=0)),
    metavar="CM DEG",
    default=(0.0, 0.0),
    show_default="0 0: the same bits",
    help="Differences that are allowed, for instance on another backend.",
)
@click.option("--other-weights", is_flag=True, help="The bundle may be another one than was flown.")
@json_option()
def replay_command(
    file: Path,
    bundle: Path,
    backend: BackendName,
    also: tuple[Path, ...],
    within: tuple[float, float],
    other_weights: bool,
    as_json: bool,
) -> None:
    """Feed the recording FILE to a bundle, and compare the actions; ends with 1 if they differ or some are missing.

    Example: worldvln-edge replay recordings/20261121T235900.250Z-a3901555b1ae9325.000.mcap --bundle bundle/
    """
    from worldvln_edge.runtime.recording.recorded_policy import load_recorded_policy
    from worldvln_edge.runtime.recording.recording_reader import Recording
    from worldvln_edge.runtime.recording.replay import replay

    recording = Recording(file)
    policy = load_recorded_policy(
        recording.opening, bundle, backend=backend, also=also, takes_other_weights=other_weights
    )
    try:
        messages = (timed.message for timed in recording)
        report = replay(recording.opening, messages, policy, within_cm=within[0], within_deg=within[1])
        here = f"{policy.info.backend} on {policy.info.device}"
    finally:
        policy.close()
    for problem in recording.problems:
        click.echo(problem, err=True)
    if recording.is_there_more and not report.missing:
        report.missing = recording.problems[-1]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        flown = f"{recording.opening.policy.backend} on {recording.opening.policy.device}"
        click.echo(f"{report.segments} segments, flown with {flown}, replayed with {here}")
        if report.first_difference is None and report.segments:
            click.echo("all actions are the same" if not report.missing else "their actions are the same")
        elif report.first_difference is not None:
            click.echo(f"first difference: {report.first_difference}")
            click.echo(f"largest: {report.max_cm:.6g} cm, {report.max_deg:.6g} deg; {report.different} segments differ")
        if report.missing:
            click.echo(f"not compared{' further' if report.segments else ''}: {report.missing}")
    if not report.is_same:
        raise click.exceptions.Exit(1)
