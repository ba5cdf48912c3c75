"""What a run says about itself: `loss_curve.jsonl` and TensorBoard always, Weights & Biases where it is asked for.

Rows that an unbroken run would write are written by a resumed one too, once each: rows behind the checkpoint are cut
off, and the sums since the last row are part of the checkpoint.
Source: spec/training.md 2.9.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from worldvln_edge.atomic import atomic_file
from worldvln_edge.config import ConfigError

EXTRA_COLUMNS = {"stage", "step", "epoch", "seconds", "lr", "skipped", "rows_per_s", "tokens_per_s", "mfu"}
"""Columns of a row that are neither losses nor metrics."""
HELD_OUT = "held_out_"
"""Begins the column of a metric of held-out rows."""


class LogWriteError(RuntimeError):
    """The curve of a run could not be written; its checkpoints are whole."""


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn what the system says about a file into LogWriteError."""
    try:
        yield
    except OSError as error:
        raise LogWriteError(
            f"{file} cannot be written ({error.strerror or error}); make room and give the same command again: it goes "
            "on from the last checkpoint"
        ) from error


class LossLog:
    """Writers of one run; only the first rank has one.

    Args:
        curve_file: JSON lines, one row per logged step or validation.
        events: folder of TensorBoard event files, or None.
        wandb_project: project of Weights & Biases, or None.
        stage: in every row, and the name of the wandb run.
        run_id: names the run there; a resumed run goes on in it.
        first_step: steps that are done; later rows of an interrupted run are dropped.

    Raises:
        ConfigError: wandb is asked for and not installed.
        LogWriteError: the disk is full, or the file is none.
    """

    def __init__(
        self,
        curve_file: Path,
        events: Path | None,
        wandb_project: str | None,
        *,
        stage: str,
        run_id: str,
        first_step: int,
    ):
        self._curve_file, self._stage = curve_file, stage
        with writing(curve_file):
            self._written = _cut(curve_file, first_step)
        self._writer = self._wandb = None
        if events is not None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(events), purge_step=first_step + 1)
        if wandb_project is not None:
            try:
                import wandb
            except ModuleNotFoundError as error:
                raise ConfigError(
                    "trainer.wandb_project is set, and wandb is not installed; run: pip install wandb"
                ) from error
            folder = str(curve_file.parent)
            self._wandb = wandb.init(project=wandb_project, name=stage, id=run_id, dir=folder, resume="allow")

    def write(self, step: int, values: Mapping[str, float], extra: Mapping[str, float | int]) -> None:
        """Append a row, unless the interrupted run wrote it already.

        Args:
            step: optimiser steps done.
            values: losses or metrics; also drawn.
            extra: what stands before them (epoch, seconds, rates); drawn below `run/`.

        Raises:
            LogWriteError: the disk is full.
        """
        if (step, *sorted(values)) in self._written:
            return
        shown = {name: float(f"{v:.9g}") if math.isfinite(v) else None for name, v in values.items()}  # JSON has no NaN
        row = {"stage": self._stage, "step": step, **extra, **shown}
        with writing(self._curve_file), self._curve_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        drawn = {f"{self._stage}/{k}": v for k, v in values.items()} | {f"run/{k}": v for k, v in extra.items()}
        if self._writer is not None:
            for name, value in drawn.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(drawn, step=step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_curve(curve_file: Path) -> list[dict[str, float]]:
    """Rows of a loss curve; a last line that a killed process did not finish is left out."""
    if not curve_file.exists():
        return []
    rows = []
    for line in curve_file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _cut(curve_file: Path, step: int) -> set[tuple]:
    """Drop rows behind `step`; returns the steps and columns of what is left."""
    if not curve_file.exists():
        return set()
    kept = [row for row in read_curve(curve_file) if row["step"] <= step]
    with atomic_file(curve_file) as building:
        building.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return {(row["step"], *sorted(row.keys() - EXTRA_COLUMNS)) for row in kept}
