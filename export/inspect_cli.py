"""Command `inspect`: what a bundle holds, what a session needs, and what a segment costs where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.presets import PRESET_NAMES

if TYPE_CHECKING:
    from worldvln_edge.export.inspect_report import InspectReport
    from worldvln_edge.runtime.worldvln.session_memory import SessionMemory

_NOTE = (
    "Roofline seconds are an estimate, not a measurement: the sum over graph calls of max(operations / dense peak\n"
    "rate, bytes / bandwidth), weights read once a call. Launches, elementwise work, activations that leave the chip\n"
    "and the host's work are not in it; real segments take longer. Peaks and their sources: --json."
)


@click.command("inspect")
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--preset", "preset_name", type=click.Choice(PRESET_NAMES), help="Report on a preset; no bundle needed.")
@click.option("--precision", help="Of the world model's weights; with --preset only, fp16 by default.")
@click.option("--device", "device_names", multiple=True, help="Estimate for this device only; may be repeated.")
@click.option("--text-tokens", type=click.IntRange(min=1), help="Length of the prompt; 32 by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def inspect_command(
    bundle: Path | None,
    preset_name: str | None,
    precision: str | None,
    device_names: tuple[str, ...],
    text_tokens: int | None,
    as_json: bool,
) -> None:
    """Show graphs, bytes, compute per segment and an estimate per device, without loading weights.

    Example: worldvln-edge inspect bundle --device agx-orin-64gb
    """
    import msgspec

    from worldvln_edge.export.devices import DEVICES, find_device

    if (bundle is None) == (preset_name is None):
        raise click.UsageError("name a bundle folder or a --preset, one of the two")
    if bundle is not None and precision is not None:
        raise click.UsageError("--precision goes with --preset; a bundle has its own")
    devices = [find_device(name) for name in device_names] or list(DEVICES.values())
    if bundle is not None:
        from worldvln_edge.export.inspect_report import inspect_bundle

        report = inspect_bundle(bundle, devices=devices, text_tokens=text_tokens)
    else:
        from worldvln_edge.export.graph_sources import guidance_rows, kv_capacity
        from worldvln_edge.export.inspect_report import inspect_config
        from worldvln_edge.export.parameter_counts import PRECISIONS
        from worldvln_edge.presets import preset

        precision = precision or "fp16"
        if precision not in PRECISIONS:
            raise click.BadParameter(f"{precision!r} is none of {', '.join(PRECISIONS)}", param_hint="--precision")
        config = preset(preset_name)
        report = inspect_config(
            config,
            precision=precision,
            rows=guidance_rows(config),
            kv_capacity=kv_capacity(config),
            devices=devices,
            text_tokens=text_tokens,
        )
    click.echo(msgspec.json.encode(report).decode() if as_json else render(report))


def render(report: InspectReport) -> str:
    """The report as text: sections with one table each."""
    memory = report.memory
    sections = [
        f"{report.name}, {report.precision}: {_count(report.parameters)} parameters, {_bytes(memory.weights)}",
        _graph_table(report) if report.graphs else _network_table(report),
        "\n".join(
            [
                f"One session (guidance rows {report.guidance_rows}, cache of {report.kv_capacity} entries, prompt of "
                f"{report.text_tokens} tokens)",
                f"  KV cache buffers       {_bytes(memory.kv_buffers)}",
                f"  KV of earlier scales   {_bytes(memory.kv_stored)}",
                f"  VAE encoder state      {_bytes(memory.vae_encoder_state)}",
                f"  VAE decoder state      {_bytes(memory.vae_decoder_state)}",
                f"  activation peak        {_bytes(memory.activation_peak)} (estimate)",
                f"  weights and session    {_bytes(memory.total)}",
            ]
        ),
        _bound_table(memory.session_at_most),
        _segment_table(report),
        _roofline_table(report),
        _NOTE,
    ]
    return "\n\n".join(sections)


def _bound_table(bound: SessionMemory) -> str:
    rows = [
        ("keys and values", bound.keys_and_values),
        ("VAE states", bound.vae_states),
        ("observed clips", bound.clips),
        ("frames and latents", bound.frames),
        ("draws", bound.draws),
        ("prediction", bound.prediction),
        ("together", bound.total),
    ]
    title = "One session on a server, at most (the longest prompt, changed on the way; buffers are shared)"
    return f"{title}\n{_columns([(name, _bytes(size)) for name, size in rows])}"


def _graph_table(report: InspectReport) -> str:
    rows = [("graph", "precision", "operators", "parameters", "bytes")]
    for graph in report.graphs:
        sizes = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in graph.bytes_by_dtype.items())
        rows.append((graph.name, graph.precision, str(graph.operators), _count(graph.parameters), sizes))
    total = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in report.bytes_by_dtype.items())
    rows.append(("stored, each once", "", "", _count(report.parameters), total))
    lines = [_columns(rows), "", "Inputs and outputs (caches and streaming states left out)"]
    for graph in report.graphs:
        sides = []
        for specs in (graph.inputs, graph.outputs):
            shown = [s for s in specs if not s.name.startswith(("past_", "present_", "state_", "next_state_"))]
            sides.append(", ".join(f"{s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in shown))
        lines.append(f"  {graph.name}: {sides[0]} -> {sides[1] or 'caches'}")
    return "\n".join(lines)


def _network_table(report: InspectReport) -> str:
    rows = [("network", "parameters"), *((name, f"{count:,}") for name, count in report.networks.items())]
    sizes = [("precision", "weights"), *((p, _bytes(size)) for p, size in report.weight_bytes_by_precision.items())]
    return f"{_columns(rows)}\n\n{_columns(sizes)}"


def _segment_table(report: InspectReport) -> str:
    rows = [("segment", "schedule", "token-steps", "calls", "FLOP", "most of it")]
    for number, segment in enumerate(report.segments, 1):
        for name, schedule in (("minimal", segment.minimal), ("full horizon", segment.full_horizon)):
            most = sorted(schedule.flops_by_graph.items(), key=lambda item: -item[1])[:3]
            shares = ", ".join(f"{graph} {flops / schedule.flops:.0%}" for graph, flops in most)
            rows.append(
                (
                    str(number),
                    name,
                    f"{schedule.token_steps:,}",
                    str(schedule.world_model_calls),
                    _flop(schedule.flops),
                    shares,
                )
            )
    return f"Compute per segment (token-steps per guidance row, world model calls)\n{_columns(rows)}"


def _roofline_table(report: InspectReport) -> str:
    rows = [("device", "minimal, s per segment", "full horizon, s per segment", "memory needed", "fits")]
    for line in report.roofline:
        rows.append(
            (
                line.device,
                " / ".join(f"{s:.3g}" for s in line.minimal_seconds),
                " / ".join(f"{s:.3g}" for s in line.full_horizon_seconds),
                f"{_bytes(line.bytes_needed)} of {_bytes(line.memory_bytes)}",
                "yes" if line.fits else "no",
            )
        )
    return f"Roofline estimate\n{_columns(rows)}"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def _flop(number: int) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number / 1e6:.2f} M"
