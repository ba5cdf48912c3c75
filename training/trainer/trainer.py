"""The loop: every stage of training on one process or many, with exact resume.

A run is a function of (stage, optimiser, seed): the number of ranks, interruptions and how it is watched do not change
it. Everything random is seeded by (seed, epoch, step, micro-batch) or (seed, epoch, row).
Source: spec/training.md 1.5, 2.6-2.9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
from torch import Tensor

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.curve_plot import plot_curve
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.loading import LoadedStep, load_steps
from worldvln_edge.training.trainer.loss_log import HELD_OUT, LossLog
from worldvln_edge.training.trainer.optimiser import OptimiserConfig
from worldvln_edge.training.trainer.run_folder import (
    CHECKPOINTS,
    CURVE_FILE,
    CURVE_PICTURE,
    EVENTS,
    identity_hash,
    open_run,
)
from worldvln_edge.training.trainer.stage import Stage, best_metric, listed_rows
from worldvln_edge.training.trainer.stage_run import StageRun, StepOutcome
from worldvln_edge.training.trainer.step_meter import StepMeter
from worldvln_edge.training.trainer.stop_signal import StopSignal
from worldvln_edge.training.trainer.training_checkpoint import Best, Progress, TrainingCheckpoints


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class TrainingStoppedError(RuntimeError):
    """The run was asked to stop; its last step is saved."""


class TrainerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How runs are computed, watched and saved: table `[trainer]`. Only `precision` changes what is trained."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products under autocast; parameters, optimiser and losses stay fp32."""
    log_every: int = 20
    validate_every: int = 500
    """Steps; 0: at the end only."""
    save_every: int = 1000
    keep_last: int = 2
    keep_best: bool = True
    """Keep and export the step with the smallest `best_metric` of a stage that has one; false: the last step."""
    max_bad_steps: int = 20
    """So many steps in a row without a finite loss end the run."""
    workers: int = 0
    """Processes per rank that load ahead."""
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        least = {"log_every": 1, "validate_every": 0, "save_every": 1, "keep_last": 1, "max_bad_steps": 1, "workers": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"trainer.{name} must be >= {smallest}, found {getattr(self, name)}")


def run_identity(
    stage: str, seed: int, config: TrainerConfig, optimiser: OptimiserConfig, other: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the result of a run depends on: content of its `run.json`."""
    return {
        "stage": stage,
        "seed": seed,
        "precision": config.precision,
        "optimiser": msgspec.to_builtins(optimiser),
        **other,
    }


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    steps: int
    skipped_steps: int
    """Of these, without a finite loss or gradient."""
    metrics: Mapping[str, float]
    """Of the last validation."""
    weights: Mapping[str, Tensor]
    """State dict of the network on the CPU: averaged or best where the recipe asks for that. First rank only."""


@dataclass(frozen=True, kw_only=True)
class _Active:
    """What a run holds while it goes."""

    run: StageRun
    log: LossLog | None
    meter: StepMeter
    stop: StopSignal
    seconds_before: float


class Trainer:
    """A run of one stage.

    Args:
        stage: its network is on the ranks' device.
        optimiser: rates and length.
        config: watching and saving.
        folder: of the run: `run.json`, `loss_curve.jsonl` and its picture, `tensorboard/`, `checkpoints/`.
        identity: what the run depends on besides optimiser, precision and seed (stage config, preset, fingerprint of
            the data), as JSON values.
        seed: of what networks draw.
        ranks: the processes; None: this one, on the CPU.
        peak_flops: of one device, for MFU; None: unknown.
        show_progress: a bar on stderr.
    """

    def __init__(
        self,
        stage: Stage,
        optimiser: OptimiserConfig,
        config: TrainerConfig,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        seed: int,
        ranks: Ranks | None = None,
        peak_flops: float | None = None,
        show_progress: bool = True,
    ):
        self._stage, self._optimiser, self._config, self._folder = stage, optimiser, config, folder
        self._seed, self._ranks, self._peak_flops = seed, ranks or Ranks(), peak_flops
        self._show_progress = show_progress and self._ranks.is_first
        self._identity = run_identity(stage.name, seed, config, optimiser, identity)
        self._sha256 = identity_hash(self._identity)
        self._checkpoints = TrainingCheckpoints(
            folder / CHECKPOINTS, self._ranks, keep_last=config.keep_last, run_sha256=self._sha256
        )

    def run(self) -> TrainingResult:
        """Train to the end, from the last checkpoint on where there is one.

        Raises:
            WorkFolderError: the folder is another run's.
            TrainingDivergedError: `max_bad_steps` steps in a row without a finite loss.
            TrainingStoppedError: SIGTERM or SIGINT came; the state is saved.
            CheckpointWriteError, CheckpointReadError, LogWriteError, LoadingError, RanksError, ConfigError: see there.
        """
        with open_run(self._folder, self._identity, self._ranks), StopSignal() as stop:
            run = StageRun(
                self._stage, self._optimiser, self._ranks, bf16=self._config.precision == "bf16", seed=self._seed
            )
            progress = Progress(step=0, epoch=0, step_in_epoch=0)
            saved = self._checkpoints.steps()
            if saved:
                progress = self._checkpoints.load(saved[-1], run.network, run.optimiser, run.average)
            with self._watch(progress) as (log, meter):
                active = _Active(run=run, log=log, meter=meter, stop=stop, seconds_before=progress.seconds)
                progress, metrics = self._go_on(progress, active)
                progress, metrics = self._finish(progress, metrics, active)
            if self._ranks.is_first:
                plot_curve(self._folder / CURVE_FILE, self._folder / CURVE_PICTURE)
            if self._config.keep_best and progress.best is not None and progress.best.step != progress.step:
                self._checkpoints.load(progress.best.step, run.network, run.optimiser, run.average)
            return TrainingResult(
                steps=progress.step, skipped_steps=progress.skipped_steps, metrics=metrics, weights=run.weights()
            )

    @cached_property
    def total_steps(self) -> int:
        """Of the run; with `epochs`, as if all were as long as the first."""
        config = self._optimiser
        return config.total_steps(0 if config.steps is not None else len(self._stage.plan(0)))

    @contextmanager
    def _watch(self, progress: Progress) -> Iterator[tuple[LossLog | None, StepMeter]]:
        peak = None if self._peak_flops is None else self._peak_flops * self._ranks.count
        log = None
        if self._ranks.is_first:
            log = LossLog(
                self._folder / CURVE_FILE,
                self._folder / EVENTS if self._config.tensorboard else None,
                self._config.wandb_project,
                stage=self._stage.name,
                run_id=self._sha256[:16],
                first_step=progress.step,
            )
        meter = StepMeter(
            self._stage.name,
            done=progress.step,
            total=self.total_steps,
            peak_flops=peak,
            show=self._show_progress,
        )
        try:
            yield log, meter
        finally:
            meter.close()
            if log is not None:
                log.close()

    def _go_on(self, progress: Progress, active: _Active) -> tuple[Progress, dict[str, float] | None]:
        """Make the steps that are missing; returns the metrics too if the last of them was validated."""
        config, limit, total = self._config, self._optimiser.steps, self.total_steps
        metrics = epoch = None
        if limit is not None and progress.step >= limit:
            return progress, metrics
        for loaded in load_steps(
            self._stage,
            progress.position,
            self._ranks,
            workers=config.workers,
            seed=self._seed,
            epochs=self._optimiser.epochs,
        ):
            if loaded.at.epoch != epoch:
                epoch = loaded.at.epoch
                active.run.start_epoch(epoch)
            outcome = active.run.step(loaded, progress.step, total, stop=active.stop)
            active.meter.add(rows=loaded.rows, tokens=outcome.tokens, flops=outcome.flops)
            progress = self._count(progress, loaded, outcome, active)
            if progress.step % config.log_every == 0:
                progress = self._log_losses(progress, active)
            best, metrics = progress.best, None
            if config.validate_every and progress.step % config.validate_every == 0:
                progress, metrics = self._validate(progress, active)
            if progress.step % config.save_every == 0 or progress.best != best or outcome.stops:
                self._save(progress, active)
            if outcome.stops:
                raise TrainingStoppedError(
                    f"{self._stage.name}: stopped after step {progress.step}, which is saved in {self._folder}; "
                    "the same command goes on from there"
                )
            if progress.step == limit:
                break
        return progress, metrics

    def _finish(
        self, progress: Progress, metrics: dict[str, float] | None, active: _Active
    ) -> tuple[Progress, dict[str, float]]:
        """Log, validate and save the last step."""
        if progress.curves:
            progress = self._log_losses(progress, active)
        if metrics is None:
            progress, metrics = self._validate(progress, active)
        self._save(progress, active)
        return progress, metrics

    def _count(self, progress: Progress, loaded: LoadedStep, outcome: StepOutcome, active: _Active) -> Progress:
        """Add a step to the progress, or say that the run has diverged."""
        done = {
            "step": progress.step + 1,
            "epoch": loaded.after.epoch,
            "step_in_epoch": loaded.after.step,
            "seconds": active.seconds_before + active.meter.seconds,
        }
        if outcome.is_finite:
            curves = dict(progress.curves)
            for name, value in outcome.terms.items():
                total, count = curves.get(name, (0.0, 0))
                curves[name] = (total + value, count + 1)
            return msgspec.structs.replace(progress, **done, skipped_in_a_row=0, curves=curves)
        in_a_row = progress.skipped_in_a_row + 1
        if in_a_row >= self._config.max_bad_steps:
            bad = [name for name, value in outcome.terms.items() if not math.isfinite(value)]
            rows = (
                f", first in the micro-batch of {listed_rows(self._stage, outcome.bad_rows)}"
                if outcome.bad_rows
                else ""
            )
            raise TrainingDivergedError(
                f"{self._stage.name}: {in_a_row} steps in a row without a finite loss, last step {done['step']} "
                f"(epoch {loaded.at.epoch}): {', '.join(bad)} not finite{rows}. Lower the learning rate, or look at "
                "these rows"
            )
        skipped = progress.skipped_steps + 1
        return msgspec.structs.replace(progress, **done, skipped_in_a_row=in_a_row, skipped_steps=skipped)

    def _log_losses(self, progress: Progress, active: _Active) -> Progress:
        """Write the mean losses since the last row, and begin new ones."""
        means = {name: total / count for name, (total, count) in progress.curves.items()}
        rates = active.meter.rates()
        active.meter.show({name: means[name] for name in ("loss",) if name in means} | rates)
        if active.log is not None and means:
            extra: dict[str, float | int] = {
                "epoch": progress.last_epoch,
                "seconds": round(progress.seconds, 1),
                "lr": self._optimiser.rate(progress.step - 1, self.total_steps),
                "skipped": progress.skipped_steps,
            }
            active.log.write(progress.step, means, extra | rates)
        return msgspec.structs.replace(progress, curves={})

    def _validate(self, progress: Progress, active: _Active) -> tuple[Progress, dict[str, float]]:
        """Metrics into the log, and whether they are the best so far."""
        metrics = active.run.validate()
        if active.log is not None and metrics:
            held_out = {HELD_OUT + name: value for name, value in metrics.items()}
            active.log.write(progress.step, held_out, {"epoch": progress.last_epoch})
        name = best_metric(self._stage) if self._config.keep_best else None
        if name is None or name not in metrics:  # no held-out rows
            return progress, metrics
        value, best = metrics[name], progress.best
        if math.isfinite(value) and (best is None or value < best.value):
            progress = msgspec.structs.replace(progress, best=Best(metric=name, value=value, step=progress.step))
        return progress, metrics

    def _save(self, progress: Progress, active: _Active) -> None:
        self._checkpoints.save(progress, active.run.network, active.run.optimiser, active.run.average)
