"""One run of `worldvln-edge eval acceptance`: measure checkpoints, hold them against the list, and write what came out.

    acceptance.json        verdicts, and all metrics of every checkpoint
    acceptance.md          the list, and every checkpoint's chain of stages
    measured/              what was measured of a checkpoint on these flights; taken up by the next run
    overfit/               the runs of `--overfit`; an interrupted one goes on

A checkpoint is measured again when its files, the flights, their number, the seed or the program's version change.
Source: spec/training.md 8.4.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from worldvln_edge import __version__
from worldvln_edge.atomic import atomic_file
from worldvln_edge.bundle import file_entry
from worldvln_edge.models.checkpoint_source import open_any
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.runtime.bench.report_table import Part, render
from worldvln_edge.training.data.simulator_flights import SimulatorFlights
from worldvln_edge.training.evaluation.acceptance import (
    LIMITS_OF,
    LimitsOf,
    Verdict,
    acceptance_lines,
    is_accepted,
    verdicts,
)
from worldvln_edge.training.evaluation.acceptance_tables import verdict_parts
from worldvln_edge.training.evaluation.flight_report import write_json
from worldvln_edge.training.evaluation.open_loop import OpenLoopReport, measure_open_loop
from worldvln_edge.training.evaluation.open_loop_tables import chain_parts
from worldvln_edge.training.evaluation.overfit import OverfitConfig, OverfitReport, measure_overfit
from worldvln_edge.training.sim.shards import fingerprint_shards, list_shards
from worldvln_edge.training.trainer.run_folder import RUN_FILE

RECORD_FILE, MARKDOWN_FILE = "acceptance.json", "acceptance.md"
_MEASURED, _OVERFIT = "measured", "overfit"
_VERSION = 1  # of what is measured; a change measures every checkpoint again
_CHECKPOINT_FILES = ("config.json", "label_stats.json", "model.safetensors", "tokenizer.json", RUN_FILE)

_Kept = TypeVar("_Kept", OpenLoopReport, OverfitReport)


class AcceptanceError(ValueError):
    """Checkpoints that cannot be held against one list. The message says what was found and what to give."""


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one checkpoint."""

    checkpoint: str
    """As the user gave it."""
    label: str
    """In tables: its seed, where the checkpoints tell them and they differ."""
    open_loop: OpenLoopReport
    overfit: OverfitReport | None


class AcceptanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `acceptance.json`."""

    preset: str
    limits_of: LimitsOf
    flights: str
    checkpoints: tuple[CheckpointRecord, ...]
    verdicts: tuple[Verdict, ...]
    is_accepted: bool

    def list_parts(self) -> list[Part]:
        """The list alone."""
        labels = [record.label for record in self.checkpoints]
        return verdict_parts(labels, self.verdicts)


@dataclass(frozen=True, kw_only=True)
class AcceptanceConfig:
    out: Path
    flights: Path
    """Shards of held-out flights."""
    limits_of: LimitsOf | None = None
    """Whose limits; None: the preset's own."""
    limit: int | None = None
    """Use at most that many flights."""
    seed: int = 0
    with_overfit: bool = False
    overfit: OverfitConfig = field(default_factory=OverfitConfig)


def run_acceptance(
    checkpoints: Sequence[Path], config: AcceptanceConfig, *, show_progress: bool = True
) -> tuple[AcceptanceRecord, str]:
    """Measure checkpoints on the CPU and write the files of a run.

    Args:
        checkpoints: folders of one preset that differ by their seed; at least one.
        config: what is measured, and where it is written.
        show_progress: bars on stderr.

    Returns:
        The record, and its tables for a terminal.

    Raises:
        AcceptanceError: checkpoints of different presets, one that is given twice, or a preset without limits.
        CheckpointError, ConfigError, FlightDataError, OpenLoopError: see `measure_open_loop`.
        WorkFolderError, TrainingDivergedError, TrainingStoppedError, CheckpointWriteError: see `measure_overfit`.
    """
    identities = {checkpoint: _identity(checkpoint) for checkpoint in checkpoints}
    preset = _one_preset(checkpoints, identities)
    limits_of = config.limits_of or _limits_of(preset)
    shards = fingerprint_shards(list_shards(config.flights))
    labels = checkpoint_labels(checkpoints)
    records = []
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        report = _open_loop(checkpoint, [identities[checkpoint], shards], config, show_progress)
        overfit = None
        if config.with_overfit:
            overfit = _overfit(checkpoint, [identities[checkpoint], shards], config, show_progress)
        records.append(CheckpointRecord(checkpoint=str(checkpoint), label=label, open_loop=report, overfit=overfit))
    found = verdicts([acceptance_lines(record.open_loop, record.overfit) for record in records], limits_of)
    record = AcceptanceRecord(
        preset=preset,
        limits_of=limits_of,
        flights=str(config.flights),
        checkpoints=tuple(records),
        verdicts=tuple(found),
        is_accepted=is_accepted(found),
    )
    return record, _write(record, config.out)


def read_acceptance(folder: Path) -> AcceptanceRecord:
    """The record of a finished run. Raises AcceptanceError: none, or of another program version."""
    path = folder / RECORD_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=AcceptanceRecord)
    except OSError as error:
        raise AcceptanceError(f"{path}: {error.strerror}; run `worldvln-edge eval acceptance` first") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AcceptanceError(
            f"{path}: not the record of an acceptance run ({error}); run `worldvln-edge eval acceptance` again"
        ) from error


def checkpoint_labels(checkpoints: Sequence[Path]) -> list[str]:
    """Short names: the seeds, the folders' names, or whole paths, whichever is the first to tell them apart."""
    if len(checkpoints) == 1:
        return ["value"]
    seeds = [_seed(checkpoint) for checkpoint in checkpoints]
    if None not in seeds and len(set(seeds)) == len(seeds):
        return [f"seed {seed}" for seed in seeds]
    names = [checkpoint.resolve().name for checkpoint in checkpoints]
    return names if len(set(names)) == len(names) else [str(checkpoint) for checkpoint in checkpoints]


def _open_loop(checkpoint: Path, identity: list[str], config: AcceptanceConfig, show_progress: bool) -> OpenLoopReport:
    digest = _digest([_VERSION, __version__, *identity, config.limit, config.seed])
    path = config.out / _MEASURED / f"{digest}.json"
    kept = _read(path, OpenLoopReport)
    if kept is not None:
        return kept
    report = measure_open_loop(
        checkpoint, config.flights, limit=config.limit, seed=config.seed, show_progress=show_progress
    )
    write_json(path, report)
    return report


def _overfit(checkpoint: Path, identity: list[str], config: AcceptanceConfig, show_progress: bool) -> OverfitReport:
    settings = msgspec.to_builtins(config.overfit)
    folder = config.out / _OVERFIT / _digest([_VERSION, __version__, *identity, config.seed, settings])
    kept = _read(folder / "overfit.json", OverfitReport)
    if kept is not None:
        return kept
    loaded = load_checkpoint(checkpoint)
    flights = SimulatorFlights(config.flights, loaded.config.image_hw)
    report = measure_overfit(loaded, flights, folder, config.overfit, seed=config.seed, show_progress=show_progress)
    write_json(folder / "overfit.json", report)
    return report


def _read(path: Path, kind: type[_Kept]) -> _Kept | None:
    """What an earlier run kept; None where there is nothing, or of another program version."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _identity(checkpoint: Path) -> str:
    """sha256 over the files that are measured."""
    files = {name: file_entry(checkpoint / name).sha256 for name in _CHECKPOINT_FILES if (checkpoint / name).is_file()}
    if "config.json" not in files or "model.safetensors" not in files:
        raise AcceptanceError(
            f"{checkpoint} is no checkpoint folder: config.json or model.safetensors is missing; give one that "
            "`worldvln-edge train` wrote"
        )
    return _digest(files)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _one_preset(checkpoints: Sequence[Path], identities: dict[Path, str]) -> str:
    if len(set(identities.values())) < len(checkpoints):
        raise AcceptanceError("a checkpoint is given twice; give checkpoints of different seeds")
    presets = {str(checkpoint): open_any(checkpoint).config.name for checkpoint in checkpoints}
    if len(set(presets.values())) > 1:
        listed = ", ".join(f"{checkpoint} is {name}" for checkpoint, name in presets.items())
        raise AcceptanceError(f"checkpoints of different presets: {listed}; give those of one preset")
    return next(iter(presets.values()))


def _limits_of(preset: str) -> LimitsOf:
    for name in LIMITS_OF:
        if name == preset:
            return name
    raise AcceptanceError(f"the list has no limits for {preset!r}; give --limits {' or --limits '.join(LIMITS_OF)}")


def _seed(checkpoint: Path) -> int | None:
    """That all stages of a run had; None where `run.json` does not say one."""
    try:
        runs = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    seeds = {run.get("seed") for run in runs.values() if isinstance(run, dict)} if isinstance(runs, dict) else set()
    found = seeds.pop() if len(seeds) == 1 else None
    return found if isinstance(found, int) else None


def _write(record: AcceptanceRecord, out: Path) -> str:
    parts = record.list_parts()
    for checkpoint in record.checkpoints:
        report = checkpoint.open_loop
        name = checkpoint.checkpoint if len(record.checkpoints) == 1 else f"{checkpoint.label}, {checkpoint.checkpoint}"
        parts.append(f"{name}, {report.flights} flights of the split {report.split}, seed {report.seed}:")
        parts += chain_parts(report.backbone, report.action, report.teacher_forced, report.rgb_head)
    title = f"Acceptance of {record.preset}, limits of {record.limits_of}"
    write_json(out / RECORD_FILE, record)
    with atomic_file(out / MARKDOWN_FILE) as building:
        building.write_text(render([f"# {title}", *parts], markdown=True) + "\n", encoding="utf-8")
    return render([f"{title}:", *parts])
