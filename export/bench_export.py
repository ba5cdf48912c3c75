"""Command `bench-export`: time, memory and size of exports at real size, on random weights.

Every step runs in a process of its own, so that the peak memory is the step's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

from worldvln_edge.config import ModelConfig
from worldvln_edge.presets import PRESET_NAMES, preset

PRECISIONS = ("fp32", "fp16", "bf16", "int4")
"""What can be measured: int8 and fp8 need a calibration, and random weights have no activations worth measuring."""


class BenchExportError(RuntimeError):
    """A step that failed. The message names its command and what can be used again."""


class ExportStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step took."""

    step: str
    """`make-checkpoint PRESET` or `export PRECISION`."""
    bytes: int
    """Of what it wrote."""
    seconds: float
    peak_rss_bytes: int
    """Most memory that its process held."""
    backbone_bytes: int | None = None
    """Of an export: tensors that the world model's graphs refer to, each once."""


@click.command("bench-export")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(PRESET_NAMES),
    default="worldvln-8b",
    show_default=True,
    help="Sizes of the random checkpoint.",
)
@click.option(
    "--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Use this checkpoint instead."
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    default=("fp16", "int4"),
    show_default=True,
    help="Export in this precision; may be repeated.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/bench-export"),
    show_default=True,
    help="Takes the checkpoint and one bundle at a time (45 GB for worldvln-8b).",
)
@click.option("--keep", is_flag=True, help="Keep checkpoint and bundles.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def bench_export_command(
    preset_name: str, checkpoint: Path | None, precisions: tuple[str, ...], work: Path, keep: bool, as_json: bool
) -> None:
    """Measure exports at real size on random weights: minutes, peak memory, bytes.

    int4 is rounded to nearest here: random weights have no activations to calibrate on.

    Example: worldvln-edge bench-export --precision int4
    """
    steps = []
    for step in bench_exports(work, preset_name=preset_name, checkpoint=checkpoint, precisions=precisions, keep=keep):
        steps.append(step)
        click.echo(table([step]).splitlines()[1], err=True)  # a later step may fail, after an hour
    click.echo(msgspec.json.encode(steps).decode() if as_json else table(steps))


def bench_exports(
    work: Path, *, preset_name: str, checkpoint: Path | None, precisions: Sequence[str], keep: bool
) -> Iterator[ExportStep]:
    """Make a random checkpoint, export it in every precision, and tell what each step took, as soon as it is done.

    Args:
        work: folder for the checkpoint and the bundles.
        preset_name: sizes of the random checkpoint.
        checkpoint: measured instead of a random one, and left as it is.
        precisions: of PRECISIONS.
        keep: leave the random checkpoint and the bundles. A failure leaves what was made, too.

    Raises:
        BenchExportError: the disk is too small for checkpoint and bundle, which is said before anything is made; or a
            step failed, whose own message went to stderr.
    """
    work.mkdir(parents=True, exist_ok=True)
    source = checkpoint or work / f"random-{preset_name}"
    if checkpoint is None:
        _check_space(work, preset(preset_name), precisions, keep)
        command = ["make-checkpoint", "--preset", preset_name, "--random", "0", "--out", str(source), "--json"]
        yield _measure(f"make-checkpoint {preset_name}", command, hint="nothing was kept")
    for precision in precisions:
        bundle = work / precision
        command = ["export", "--checkpoint", str(source), "--out", str(bundle), "--precision", precision, "--json"]
        if precision == "int4":
            command += ["--int4-method", "rtn"]
        hint = f"to go on with the same checkpoint, add --checkpoint {source}"
        step = _measure(f"export {precision}", command, hint=hint)
        yield msgspec.structs.replace(step, backbone_bytes=_backbone_bytes(bundle))
        if not keep:
            shutil.rmtree(bundle)
    if checkpoint is None and not keep:
        shutil.rmtree(source)


def _check_space(work: Path, config: ModelConfig, precisions: Sequence[str], keep: bool) -> None:
    """Every step looks for itself, too; but the last one would do so after an hour."""
    from worldvln_edge.export.make_checkpoint import plan
    from worldvln_edge.export.parameter_counts import network_parameters

    networks = network_parameters(config).values()
    bundles = [sum(count.size_bytes(precision) for count in networks) for precision in precisions]
    needed = sum(tensor.size_bytes for part in plan(config).values() for tensor in part)
    needed += sum(bundles) if keep else max(bundles, default=0)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise BenchExportError(
            f"{work}: checkpoint and bundle need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose "
            "another disk with --work, or a smaller --preset"
        )


def table(steps: Sequence[ExportStep]) -> str:
    """A line of titles, and one for every step; sizes in 1e9 bytes."""
    lines = [f"{'step':<30} {'minutes':>8} {'peak GB':>8} {'GB':>7} {'backbone GB':>12}"]
    for step in steps:
        backbone = "" if step.backbone_bytes is None else f"{step.backbone_bytes / 1e9:.2f}"
        lines.append(
            f"{step.step:<30} {step.seconds / 60:>8.1f} {step.peak_rss_bytes / 1e9:>8.2f} "
            f"{step.bytes / 1e9:>7.2f} {backbone:>12}".rstrip()
        )
    return "\n".join(lines)


def _measure(name: str, command: list[str], *, hint: str) -> ExportStep:
    """Run a command of ours, whose JSON holds `bytes`, `seconds` and `peak_rss_bytes`."""
    done = subprocess.run([sys.executable, "-m", "worldvln_edge", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchExportError(
            f"`worldvln-edge {' '.join(command)}` ended with status {done.returncode}, its message stands above; {hint}"
        )
    found = json.loads(done.stdout)
    return ExportStep(step=name, bytes=found["bytes"], seconds=found["seconds"], peak_rss_bytes=found["peak_rss_bytes"])


def _backbone_bytes(bundle: Path) -> int:
    """Bytes of the tensors that the world model's graphs refer to, each once."""
    import onnx

    places: dict[str, int] = {}
    for name in ("world_model_step", "world_model_context", "latent_embed"):
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            entry = {item.key: item.value for item in tensor.external_data}
            if entry:
                places[entry["offset"]] = int(entry["length"])
    return sum(places.values())
