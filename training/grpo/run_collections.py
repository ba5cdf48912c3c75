"""Collections of a run: flown with the policy as it is, judged, scored, and kept until they are learnt from.

The first rank flies and scores; the others read what it wrote.
Source: spec/training.md 5.9 items 1-6.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.candidates import FIRST_SEED, flight_name
from worldvln_edge.training.grpo.collection import FLIGHTS, Collection, CollectionConfig
from worldvln_edge.training.grpo.fly_collection import collect
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.learner import Learner
from worldvln_edge.training.grpo.rollout import Flier
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.grpo.scored_collection import (
    GrpoError,
    ScoredCollection,
    judge_collection,
    padded,
    read_collection,
    read_numbers,
    write_collection,
)
from worldvln_edge.training.grpo.scoring import check_drift
from worldvln_edge.training.grpo.task_pool import TaskPool
from worldvln_edge.training.grpo.trace import TRACE_SUFFIX
from worldvln_edge.training.trainer.distributed import Ranks

SCORES = "scores.safetensors"
MakeFlier = Callable[[RolloutPolicy], Flier]
"""Puts a policy into environments: here, or on many machines."""
_KEPT = 2
"""Collections whose files stay, for a look at the last flights."""
_SEED_STRIDE = 1_000_003 * 1_000
"""Between the first seeds of collections, which number their tasks from 0 each."""
_SEEDS = 2**62
"""Seeds stay below, so that they and those of retries fit into the 64 bits that files have for them."""


class Pilot:
    """Flies with the learner's networks as they are.

    Args:
        learner: policy.
        stats, tokenizer: of the checkpoint.
        config: of the run.
        make_flier: where it flies.
    """

    def __init__(
        self,
        learner: Learner,
        stats: LabelStats | None,
        tokenizer: PromptTokenizer,
        config: GrpoConfig,
        make_flier: MakeFlier,
    ):
        self._learner, self._stats, self._tokenizer = learner, stats, tokenizer
        self._config, self._make_flier = config, make_flier

    def fly(
        self,
        tasks: Sequence[Task],
        folder: Path,
        *,
        candidates: int,
        first_seed: int = FIRST_SEED,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Collection | None:
        """Flights of the tasks, flown now or by an earlier process with the same networks; None: broken off."""
        config, model = self._config, self._learner.model
        model.eval()
        with self._learner.autocast():
            policy = RolloutPolicy(
                model,
                self._stats,
                self._tokenizer,
                policy_scales=config.policy_scales,
                repetitions=config.repetitions,
                rows=config.rows,
            )
            flown = collect(
                folder,
                self._make_flier(policy),
                tasks,
                CollectionConfig(candidates=candidates, first_seed=first_seed),
                should_stop=should_stop,
            )
        self._learner.run.network.train()
        return flown


class RunCollections:
    """The collections of a run.

    Args:
        pilot: flies.
        learner: scores.
        config: of the run.
        tasks: that are learnt from.
        folder: `collections/` of the run.
        seed: of the run.
        ranks: the processes.
    """

    def __init__(
        self,
        pilot: Pilot,
        learner: Learner,
        config: GrpoConfig,
        tasks: TaskPool,
        folder: Path,
        *,
        seed: int,
        ranks: Ranks,
    ):
        self._pilot, self._learner, self._config, self._tasks = pilot, learner, config, tasks
        self._folder, self._seed, self._ranks = folder, seed, ranks

    def numbers(self, index: int) -> dict[str, float]:
        """What the table says of a collection that was scored. Raises GrpoError where its scores are gone."""
        return read_numbers(self._path(index) / SCORES)

    def collect(self, index: int, *, is_begun: bool, should_stop: Callable[[], bool]) -> ScoredCollection | None:
        """A collection, flown and scored now, or read where an earlier process did; None: broken off.

        Args:
            index: of the collection, from 0.
            is_begun: the networks have learnt from it already, so that it cannot be scored any more.
            should_stop: asked after each flight; on the first rank only.

        Raises:
            GrpoError: it is begun, and its scores are gone; or it cannot be learnt from.
            RewardError, NotFiniteError, ScoringError: see `judge_collection` and `check_drift`.
            CollectionError, TraceError: see `fly_collection.collect`.
        """
        folder, is_whole = self._path(index), True
        if self._ranks.is_first and not (folder / SCORES).is_file():
            if is_begun:
                raise GrpoError(
                    f"{folder / SCORES} is gone, and the last checkpoint is in the middle of learning from it; delete "
                    "that checkpoint to go on from the one before it"
                )
            is_whole = self._score(index, should_stop)
        if not self._ranks.gather(is_whole)[0]:
            return None
        scored = read_collection(folder / SCORES, folder / FLIGHTS)
        if scored is None:
            raise GrpoError(f"{folder / SCORES}: not there; all processes of a run must share the work folder")
        return scored

    def forget(self, before: int) -> None:
        """Delete all but the last collections in front of collection `before`."""
        if self._ranks.is_first:
            for index in range(before - _KEPT - 1, -1, -1):
                if not self._path(index).exists():
                    return
                shutil.rmtree(self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}"

    def _score(self, index: int, should_stop: Callable[[], bool]) -> bool:
        config, learner = self._config, self._learner
        tasks = self._tasks.take(index, config.tasks)
        flown = self._pilot.fly(
            tasks,
            self._path(index),
            candidates=config.candidates,
            first_seed=first_seed_of(self._seed, index),
            should_stop=should_stop,
        )
        if flown is None:
            return False
        began = time.monotonic()
        traces = list(flown.traces())
        step = learner.model.config.horizon.step
        judged = judge_collection(traces, {task.task_id: task for task in tasks}, config, step=step)
        old = learner.scores(judged.samples)
        drift = check_drift(judged.samples, old, limit=config.drift_limit)
        reference = learner.reference_scores(judged.samples)
        report = flown.report
        numbers = {
            "flights": report.flights,
            "failed": len(report.failed),
            "lost_attempts": report.lost_attempts,
            "environment_steps": report.environment_steps,
            "steps_saved": report.environment_steps_saved,
            "steps_per_s": report.steps_per_second,
            "reward": sum(flight.reward for flight in judged.flights) / len(judged.flights),
            "success": sum(flight.succeeded for flight in judged.flights) / len(judged.flights),
            "groups": judged.groups,
            "dropped_groups": judged.dropped_groups,
            "start_spread_cm": judged.start_spread_cm,
            "drift": drift,
            "collect_s": report.seconds_now,
            "score_s": time.monotonic() - began,
        }
        write_collection(
            ScoredCollection(
                samples=judged.samples,
                advantages=torch.from_numpy(judged.advantages).float(),
                old_BN=padded(old),
                ref_BN=padded(reference),
                numbers={name: float(value) for name, value in numbers.items()},
            ),
            [flight_name(trace.group_id, trace.candidate_id) + TRACE_SUFFIX for trace, _ in judged.samples],
            self._path(index) / SCORES,
        )
        return True


def first_seed_of(run_seed: int, index: int) -> int:
    """First seed of the candidates of collection `index` of a run."""
    return FIRST_SEED + (run_seed * 1_000 + index) * _SEED_STRIDE % _SEEDS
