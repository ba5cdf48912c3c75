"""A GRPO run: collect, score, optimise, evaluate, repeat; resumable at any point.

The folder of the run holds `run.json`, the trainer's `checkpoints/` and loss curve, `collections/NNNNNN/` (traces of
the flights and, once they are judged, `scores.safetensors`), `evaluations/step-NNNNNNNN.json`, and the table with its
picture. What is there is not done again: a run that was killed loses the flights in the air, and the optimiser steps
since the last checkpoint, which come out as they were.
Source: spec/training.md 5.9.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.evaluating import Evaluations
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.held_out import paired_difference
from worldvln_edge.training.grpo.learner import Learner
from worldvln_edge.training.grpo.run_collections import MakeFlier, Pilot, RunCollections
from worldvln_edge.training.grpo.run_table import TABLE_FILE, TABLE_PICTURE, Row, RunTable, plot_table
from worldvln_edge.training.grpo.task_pool import TaskPool
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.loading import load_steps
from worldvln_edge.training.trainer.loss_log import HELD_OUT, LossLog
from worldvln_edge.training.trainer.run_folder import CHECKPOINTS, CURVE_FILE, EVENTS, identity_hash, open_run
from worldvln_edge.training.trainer.stop_signal import StopSignal
from worldvln_edge.training.trainer.trainer import TrainerConfig, TrainingDivergedError, TrainingStoppedError
from worldvln_edge.training.trainer.training_checkpoint import Progress, TrainingCheckpoints

COLLECTIONS, EVALUATIONS = "collections", "evaluations"
_LAST_PASS, _SECONDS = "last/", "seconds"
_SFT_METRICS = ("loss", "bit_ce")


@dataclass(frozen=True, kw_only=True)
class GrpoResult:
    collections: int
    steps: int
    best_step: int
    """Of the weights: the one with the best held-out reward."""
    weights: Mapping[str, Tensor]
    """State dict of the world model on the CPU, averaged where the recipe asks for that; first rank only."""
    rows: Sequence[Row]
    """The table; first rank only."""
    stopped_by: str
    """Why the run ended before its last collection, or nothing."""


class GrpoRun:
    """See the module.

    Args:
        learner: policy and reference.
        stats, tokenizer: of the checkpoint, for flying.
        config: of the run.
        trainer: logging and saving.
        make_flier: where the policy flies.
        tasks: that are learnt from.
        held_out: tasks that are evaluated on.
        folder: of the run.
        identity: what the run depends on besides its config, as JSON values.
        seed: of everything that is drawn.
        ranks: the processes; the first one flies.
        show: takes lines of the live table.
    """

    def __init__(
        self,
        learner: Learner,
        stats: LabelStats | None,
        tokenizer: PromptTokenizer,
        config: GrpoConfig,
        trainer: TrainerConfig,
        make_flier: MakeFlier,
        tasks: TaskPool,
        held_out: Sequence[Task],
        folder: Path,
        identity: Mapping[str, Any],
        *,
        seed: int,
        ranks: Ranks,
        show: Callable[[str], None] | None = None,
    ):
        self._learner, self._config, self._trainer = learner, config, trainer
        self._folder, self._seed, self._ranks, self._show = folder, seed, ranks, show
        pilot = Pilot(learner, stats, tokenizer, config, make_flier)
        self._collections = RunCollections(pilot, learner, config, tasks, folder / COLLECTIONS, seed=seed, ranks=ranks)
        step = learner.model.config.horizon.step
        self._evaluations = Evaluations(pilot, config, held_out, folder / EVALUATIONS, ranks, step=step)
        self._identity = {
            "stage": "grpo",
            "seed": seed,
            "config": config.identity(),
            "tasks": tasks.fingerprint,
            # Evaluations are compared with each other, so all of a run fly the same.
            "held_out": hashlib.sha256(msgspec.json.encode([list(held_out), config.evaluation.rollouts])).hexdigest(),
            **identity,
        }
        self._checkpoints = TrainingCheckpoints(
            folder / CHECKPOINTS,
            ranks,
            keep_last=max(2, trainer.keep_last),  # the one before the last may turn out to be the best
            run_sha256=identity_hash(self._identity),
        )

    def run(self) -> GrpoResult:
        """Train to the last collection or to a stop rule, from where the folder stands.

        Raises:
            WorkFolderError: the folder is another run's.
            TrainingStoppedError: SIGTERM or SIGINT came; the state is saved.
            TrainingDivergedError: a loss that is not finite.
            GrpoError, RewardError, NotFiniteError, ScoringError, TraceError: a collection that cannot be learnt from.
            CheckpointWriteError, CheckpointReadError: see there.
        """
        config, learner = self._config, self._learner
        with open_run(self._folder, self._identity, self._ranks), StopSignal() as stop:
            progress, stopped_by = self._load(), ""
            with self._logs(progress) as (log, table):
                while True:
                    collection, epochs_done = divmod(progress.epoch, config.passes)
                    is_begun = bool(epochs_done or progress.step_in_epoch)
                    if not is_begun:
                        progress, stopped_by = self._between(collection, progress, stop, log, table)
                        if stopped_by or collection >= config.collections:
                            break
                        self._stop_if_asked(stop.requested, progress)
                    scored = self._collections.collect(
                        collection, is_begun=is_begun, should_stop=lambda: stop.requested
                    )
                    if scored is None:
                        self._stop(progress)
                    learner.stage.use(scored)
                    progress = self._optimise(collection, progress, stop, log)
                best = progress.best.step if progress.best is not None else progress.step
                if best != progress.step:
                    self._checkpoints.load(best, learner.run.network, learner.run.optimiser, learner.run.average)
                if table is not None:
                    plot_table(table.rows, self._folder / TABLE_PICTURE)
                return GrpoResult(
                    collections=collection,
                    steps=progress.step,
                    best_step=best,
                    weights={name.removeprefix("world_model."): w for name, w in learner.run.weights().items()},
                    rows=[] if table is None else table.rows,
                    stopped_by=stopped_by,
                )

    def _load(self) -> Progress:
        saved, run = self._checkpoints.steps(), self._learner.run
        if not saved:
            return Progress(step=0, epoch=0, step_in_epoch=0)
        progress = self._checkpoints.load(saved[-1], run.network, run.optimiser, run.average)
        # A step is saved before it is evaluated, so the checkpoint does not know whether it is the best.
        return msgspec.structs.replace(progress, best=self._evaluations.best(progress.step))

    @contextmanager
    def _logs(self, progress: Progress) -> Iterator[tuple[LossLog | None, RunTable | None]]:
        if not self._ranks.is_first:
            yield None, None
            return
        log = LossLog(
            self._folder / CURVE_FILE,
            self._folder / EVENTS if self._trainer.tensorboard else None,
            self._trainer.wandb_project,
            stage="grpo",
            run_id=identity_hash(self._identity)[:16],
            first_step=progress.step,
        )
        try:
            done = progress.epoch // self._config.passes
            yield log, RunTable(self._folder / TABLE_FILE, done=done, show=self._show)
        finally:
            log.close()

    def _between(
        self, collection: int, progress: Progress, stop: StopSignal, log: LossLog | None, table: RunTable | None
    ) -> tuple[Progress, str]:
        """In front of a collection: save, finish the row of the one before, evaluate. Returns why to stop, or nothing.

        The policy that the run begins with has a row too, that of collection 0; collections count from 1 there.
        """
        self._save(progress)
        row, stopped_by = self._row(collection, progress), ""
        if collection:
            stopped_by = self._stop_rule(row)
        every, is_last = self._config.evaluation.every, bool(stopped_by) or collection >= self._config.collections
        if collection == 0 or is_last or (every and collection % every == 0):
            row |= self._evaluated(collection, progress, stop)
            if log is not None:
                shown = {name: value for name, value in row.items() if name.startswith(HELD_OUT)}
                log.write(progress.step, shown, {"epoch": progress.last_epoch})
        if table is not None:
            table.add(row)
        self._collections.forget(collection)
        best = self._evaluations.best(progress.step)
        return msgspec.structs.replace(progress, best=best), stopped_by

    def _evaluated(self, collection: int, progress: Progress, stop: StopSignal) -> dict[str, float]:
        with self._learner.run.averaged():
            result = self._evaluations.evaluate(progress.step, should_stop=lambda: stop.requested)
        if result is None:
            self._stop(progress)
        found = {HELD_OUT + "reward": result.reward, HELD_OUT + "success": result.success}
        if collection:
            difference = paired_difference(result, self._evaluations.of_start())
            found[HELD_OUT + "difference"] = difference.mean
            found[HELD_OUT + "error"] = math.nan if difference.standard_error is None else difference.standard_error
        sft = self._learner.run.validate()
        return found | {f"{HELD_OUT}sft_{name}": sft[name] for name in _SFT_METRICS if name in sft}

    def _row(self, collection: int, progress: Progress) -> dict[str, float]:
        """The row of the collection that is done, but for what is evaluated."""
        row: dict[str, float] = {"collection": collection, "step": progress.step}
        if not collection:
            return row
        last = {
            name.removeprefix(_LAST_PASS): total / count
            for name, (total, count) in progress.curves.items()
            if name.startswith(_LAST_PASS)
        }
        row |= self._collections.numbers(collection - 1) | last
        learning = row["score_s"] + progress.curves[_SECONDS][0]
        row["learn_s"] = learning
        row["learner_share"] = learning / (learning + row["collect_s"])
        return row

    def _stop_rule(self, row: Mapping[str, float]) -> str:
        config = self._config
        for name, limit, what in (
            ("k3", config.k3_limit, "mean k3 per bit"),
            ("clipped", config.clipped_limit, "share of clipped ratios"),
        ):
            if row[name] > limit:
                return (
                    f"{what} of the last pass is {row[name]:.3g}, above grpo.{name}_limit {limit:g}: the policy has "
                    "moved too far from where it began, or in too large steps"
                )
        return ""

    def _optimise(self, collection: int, progress: Progress, stop: StopSignal, log: LossLog | None) -> Progress:
        """The passes over a collection, or what is missing of them."""
        config, stage, run = self._config, self._learner.stage, self._learner.run
        first_epoch = collection * config.passes
        last_epoch = first_epoch + config.passes - 1
        total = config.collections * config.passes * len(stage.plan(progress.epoch))
        epoch = None
        for loaded in load_steps(
            stage, progress.position, self._ranks, workers=0, seed=self._seed, epochs=last_epoch + 1
        ):
            if loaded.at.epoch != epoch:
                epoch = loaded.at.epoch
                run.start_epoch(epoch)
            began = time.monotonic()
            outcome = run.step(loaded, progress.step, total, stop=stop)
            seconds = time.monotonic() - began
            if not outcome.is_finite:
                bad = [name for name, value in outcome.terms.items() if not math.isfinite(value)]
                raise TrainingDivergedError(
                    f"grpo: collection {collection + 1}, step {progress.step + 1}: {', '.join(bad)} not finite, "
                    f"rows {outcome.bad_rows}; lower grpo.learning_rate, or look at the rewards"
                )
            is_first = loaded.at.epoch == first_epoch and loaded.at.step == 0
            added = {_SECONDS: seconds}
            if loaded.at.epoch == last_epoch:
                added |= {_LAST_PASS + name: value for name, value in outcome.terms.items()}
            progress = msgspec.structs.replace(
                progress,
                step=progress.step + 1,
                epoch=loaded.after.epoch,
                step_in_epoch=loaded.after.step,
                seconds=progress.seconds + seconds,
                curves=_added({} if is_first else progress.curves, added),
            )
            if log is not None and progress.step % self._trainer.log_every == 0:
                rate = config.optimiser().rate(progress.step - 1, total)
                extra = {"epoch": loaded.at.epoch, "seconds": round(progress.seconds, 1), "lr": rate}
                log.write(progress.step, outcome.terms, extra)
            if progress.step % self._trainer.save_every == 0 and loaded.after.epoch <= last_epoch:
                self._save(progress)
            self._stop_if_asked(outcome.stops, progress)
        return progress

    def _stop_if_asked(self, requested: bool, progress: Progress) -> None:
        if any(self._ranks.gather(requested)):
            self._stop(progress)

    def _stop(self, progress: Progress) -> NoReturn:
        self._save(progress)
        raise TrainingStoppedError(
            f"grpo: stopped after step {progress.step}, which is saved in {self._folder}; the same command goes on "
            "from there"
        )

    def _save(self, progress: Progress) -> None:
        run = self._learner.run
        self._checkpoints.save(progress, run.network, run.optimiser, run.average)


def _added(curves: Mapping[str, tuple[float, int]], values: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """Sums and counts with one more value each."""
    found = dict(curves)
    for name, value in values.items():
        total, count = found.get(name, (0.0, 0))
        found[name] = (total + value, count + 1)
    return found
