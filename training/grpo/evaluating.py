"""Evaluations of a run: the policy on held-out tasks, once a step, and which step is the best.

Source: spec/training.md 5.9 item 9, 8.4.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.held_out import HeldOutResult, judge_held_out, read_result, write_result
from worldvln_edge.training.grpo.run_collections import Pilot
from worldvln_edge.training.grpo.scored_collection import GrpoError
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.training_checkpoint import Best


class Evaluations:
    """The evaluations of a run; the first rank flies, all know the results.

    Args:
        pilot: flies.
        config: of the run.
        tasks: held out.
        step: actions of a segment.
        folder: `evaluations/` of the run.
        ranks: the processes.
    """

    def __init__(
        self, pilot: Pilot, config: GrpoConfig, tasks: Sequence[Task], folder: Path, ranks: Ranks, *, step: int
    ):
        self._pilot, self._config, self._tasks = pilot, config, list(tasks)
        self._folder, self._ranks, self._step = folder, ranks, step

    def evaluate(self, step: int, *, should_stop: Callable[[], bool]) -> HeldOutResult | None:
        """The policy in the networks, after `step` steps; read where an earlier process flew it. None: broken off.

        Args:
            step: optimiser steps that are done.
            should_stop: asked after each flight; on the first rank only.

        Raises:
            As `RunCollections.collect`.
        """
        result = None
        if self._ranks.is_first:
            result = read_result(self._file(step)) or self._fly(step, should_stop)
        return self._ranks.gather(result)[0]

    def of_start(self) -> HeldOutResult:
        """The policy that the run began with. Raises GrpoError where it was not evaluated."""
        result = self._ranks.gather(read_result(self._file(0)) if self._ranks.is_first else None)[0]
        if result is None:
            raise GrpoError(
                f"{self._file(0)} is gone, with which later policies are compared; begin again in another work folder"
            )
        return result

    def best(self, last_step: int) -> Best | None:
        """The step with the best held-out reward, up to `last_step`; the earliest of equals."""
        found: Best | None = None
        if self._ranks.is_first:
            for file in sorted(self._folder.glob("step-*.json")):
                step, result = int(file.stem.partition("-")[2]), read_result(file)
                if result is not None and step <= last_step and (found is None or -result.reward < found.value):
                    found = Best(metric="held_out_reward", value=-result.reward, step=step)
        return self._ranks.gather(found)[0]

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.json"

    def _fly(self, step: int, should_stop: Callable[[], bool]) -> HeldOutResult | None:
        folder = self._folder / f"step-{step:08d}"
        flown = self._pilot.fly(
            self._tasks, folder, candidates=self._config.evaluation.rollouts, should_stop=should_stop
        )
        if flown is None:
            return None
        result = judge_held_out(flown.traces(), flown.report, self._tasks, self._config.reward, step=self._step)
        write_result(result, self._file(step))
        shutil.rmtree(folder)  # many flights, which nothing reads again
        return result
