"""The samples of one collection: which segments are learnt from, with which advantage, and what their bits had for
probabilities. Kept in a file, so that an interrupted run goes on with the same numbers.

Legend: B samples, N most bits of a sample, S segments of the horizon, K candidates of a group.
Source: spec/training.md 5.9 items 3-6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldvln_edge.atomic import atomic_file
from worldvln_edge.config import ConfigError
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.advantages import NotFiniteError, expected_returns, group_advantages, segment_returns
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.policy_batch import Sample
from worldvln_edge.training.grpo.published_rows import Candidate, published_rows
from worldvln_edge.training.grpo.rewards import RewardError, WeightedRewards, flight_name, has_succeeded
from worldvln_edge.training.grpo.trace import FlightTrace, read_trace
from worldvln_edge.training.sim.tasks import start_local

_SUMMARY = "collection"


class GrpoError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


class JudgedFlight(msgspec.Struct, frozen=True, kw_only=True):
    """What one flight was worth."""

    task_id: str
    candidate_id: int
    seed: int
    rewards: tuple[float, ...]
    """Of every segment of the horizon."""
    succeeded: bool

    @property
    def reward(self) -> float:
        """Mean over the segments."""
        return float(np.mean(self.rewards))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Samples and advantages of a collection, before anything is scored."""

    flights: tuple[JudgedFlight, ...]
    samples: tuple[Sample, ...]
    advantages: np.ndarray
    """float64 [B]."""
    groups: int
    """(task, segment) groups that are learnt from."""
    dropped_groups: int
    """Groups of one flight, or of flights that are worth the same."""
    start_spread_cm: float
    """Mean distance of a group's later segments from the mean of where they began."""


def judge_flights(
    traces: Iterable[FlightTrace], tasks: Mapping[str, Task], rewards: WeightedRewards, *, bonus: float
) -> list[JudgedFlight]:
    """Rewards of flights, in order.

    Args:
        traces: flights, of which one at a time is needed.
        tasks: by id.
        rewards: of a segment.
        bonus: added to every segment of a flight that succeeds.

    Raises:
        GrpoError: a flight of a task that is not there.
        RewardError, NotFiniteError: a flight that cannot be judged.
    """
    found = []
    for trace in traces:
        if trace.task_id not in tasks:
            raise GrpoError(f"{flight_name(trace)}: the tasks of this run have no such task; give another work folder")
        task = tasks[trace.task_id]
        succeeded = task.end_pos is not None and has_succeeded(trace, task)
        values = rewards(trace, task) + bonus * succeeded
        found.append(
            JudgedFlight(
                task_id=trace.task_id,
                candidate_id=trace.candidate_id,
                seed=trace.seed,
                rewards=tuple(values.tolist()),
                succeeded=succeeded,
            )
        )
    return found


def judge_collection(
    traces: Sequence[FlightTrace], tasks: Mapping[str, Task], config: GrpoConfig, *, step: int
) -> Judgement:
    """Rewards, returns and advantages of the flights of a collection.

    Args:
        traces: flights, of any tasks.
        tasks: by id.
        config: rewards and objective.
        step: actions of a segment.

    Raises:
        GrpoError: no group is left to learn from.
        RewardError, NotFiniteError: a flight that cannot be judged; the message names it.
    """
    reward = config.reward
    flights = judge_flights(
        traces, tasks, WeightedRewards(reward.weights, reward.terms, step=step), bonus=reward.success_bonus
    )
    groups: dict[str, list[int]] = defaultdict(list)
    for index, trace in enumerate(traces):
        groups[trace.group_id].append(index)
    samples: list[Sample] = []
    advantages: list[float] = []
    used = dropped = 0
    spreads: list[float] = []
    returns = _group_returns([[flights[i] for i in members] for members in groups.values()], config)
    for (group, members), (returns_KS, expected_KS) in zip(groups.items(), returns, strict=True):
        own = [traces[i] for i in members]
        if config.objective.kind == "published":
            by_segment = _published_weights(own, tasks[own[0].task_id], config, step)
        else:
            by_segment = _product_advantages(group, own, returns_KS, expected_KS, config.objective.advantage_limit)
        if not config.group_later_segments:
            by_segment = by_segment[:1]
        for segment, values in enumerate(by_segment):
            if values is None:
                dropped += 1
                continue
            used += 1
            there = [trace for trace in own if len(trace.segments) > segment]
            samples += [(trace, segment) for trace in there]
            advantages += values.tolist()
            if segment:
                starts = np.stack([trace.segments[segment].poses[0, :3] for trace in there])
                spreads.append(float(np.linalg.norm(starts - starts.mean(0), axis=1).mean()))
    if not samples:
        raise GrpoError(
            f"none of the {dropped} groups of this collection can be learnt from: each has a single flight, or flights "
            "that are worth the same; fly more candidates, or look at rewards and tasks"
        )
    return Judgement(
        flights=tuple(flights),
        samples=tuple(samples),
        advantages=np.array(advantages),
        groups=used,
        dropped_groups=dropped,
        start_spread_cm=float(np.mean(spreads)) if spreads else 0.0,
    )


def _group_returns(groups: Sequence[Sequence[JudgedFlight]], config: GrpoConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns of every group, and what of them was to be expected: float64 [K, S] each."""
    reward = config.reward
    rewards = [np.array([flight.rewards for flight in flights]) for flights in groups]
    returns = [np.stack([segment_returns(own_S, reward.discount) for own_S in own_KS]) for own_KS in rewards]
    if not config.subtract_expected:
        return [(own_KS, np.zeros_like(own_KS)) for own_KS in returns]
    # The bonus of a success is in the rewards of segments that were flown before it.
    settled = [
        own_KS - reward.success_bonus * np.array([[flight.succeeded] for flight in flights])
        for own_KS, flights in zip(rewards, groups, strict=True)
    ]
    return list(zip(returns, expected_returns(settled, returns), strict=True))


def _product_advantages(
    group: str, traces: Sequence[FlightTrace], returns_KS: np.ndarray, expected_KS: np.ndarray, limit: float
) -> list[np.ndarray | None]:
    """Of every segment, those of the flights that have it; None where a segment says nothing.

    Mean and deviation are over all flights of the group: one that ended early stands still for its later segments and
    is worth what that is worth, so the others are not compared with the survivors alone.
    """
    flown_K = np.array([len(trace.segments) for trace in traces])
    found: list[np.ndarray | None] = []
    for segment in range(flown_K.max()):
        try:
            advantages_K = group_advantages(returns_KS[:, segment], limit=limit)
            if advantages_K is not None and expected_KS[:, segment].any():
                advantages_K = group_advantages(returns_KS[:, segment] - expected_KS[:, segment], limit=limit)
        except NotFiniteError as error:
            raise NotFiniteError(f"group {group!r}, segment {segment}: {error}") from error
        found.append(None if advantages_K is None else advantages_K[flown_K > segment])
    return found


def _published_weights(
    traces: Sequence[FlightTrace], task: Task, config: GrpoConfig, step: int
) -> list[np.ndarray | None]:
    if len(task.reference_path_raw) < 2:
        raise RewardError(f'task {task.task_id!r} has no "reference_path_raw", which the published weights need')
    candidates = [
        Candidate(
            actions_N6=np.concatenate([segment.actions for segment in trace.segments]),
            log_probs_C=np.array([segment.log_prob for segment in trace.segments]),
        )
        for trace in traces
    ]
    rows = published_rows(candidates, start_local(np.array(task.reference_path_raw)), config.published, step=step)
    found: list[np.ndarray | None] = []
    for segment in range(max(len(flight) for flight in rows)):
        there = [flight[segment]["grpo_adv_final"] for flight in rows if len(flight) > segment]
        found.append(np.array(there) if len(there) > 1 else None)
    return found


class CollectionSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a collection was, beside its tensors."""

    traces: tuple[str, ...]
    """Name of the trace of every sample's flight."""
    segments: tuple[int, ...]
    """Of every sample."""
    numbers: dict[str, float]
    """For the table of the run."""


@dataclass(frozen=True, kw_only=True)
class ScoredCollection:
    """What the optimiser sees of a collection."""

    samples: tuple[Sample, ...]
    advantages: Tensor
    """float32 [B]."""
    old_BN: Tensor
    """float32: log-probabilities under the policy that flew, 0 behind the end of a sample."""
    ref_BN: Tensor
    """float32: the same under the reference policy."""
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        if not len(self.samples) == len(self.advantages) == len(self.old_BN) == len(self.ref_BN):
            raise ConfigError(f"{len(self.samples)} samples need as many advantages and scores")


def write_collection(collection: ScoredCollection, names: Sequence[str], path: Path) -> None:
    """Write everything but the traces, whole or not at all.

    Args:
        collection: what to write.
        names: of the trace of every sample's flight.
        path: file.

    Raises:
        GrpoError: it cannot be written.
    """
    summary = CollectionSummary(
        traces=tuple(names),
        segments=tuple(segment for _, segment in collection.samples),
        numbers=dict(collection.numbers),
    )
    tensors = {"advantages": collection.advantages, "old": collection.old_BN, "ref": collection.ref_BN}
    try:
        with atomic_file(path) as building:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                building,
                metadata={_SUMMARY: msgspec.json.encode(summary).decode()},
            )
    except (OSError, SafetensorError) as error:
        raise GrpoError(f"{path}: cannot be written ({error}); make room and give the same command again") from error


def read_collection(path: Path, traces: Path) -> ScoredCollection | None:
    """What `write_collection` wrote; None where there is nothing yet.

    Args:
        path: file.
        traces: folder of the traces.

    Raises:
        GrpoError: a file that is none.
        TraceError: a trace that is gone or broken.
    """
    if not path.is_file():
        return None
    tensors, summary = _read(path)
    flights = {name: read_trace(traces / name) for name in dict.fromkeys(summary.traces)}
    return ScoredCollection(
        samples=tuple((flights[name], at) for name, at in zip(summary.traces, summary.segments, strict=True)),
        advantages=tensors["advantages"],
        old_BN=tensors["old"],
        ref_BN=tensors["ref"],
        numbers=summary.numbers,
    )


def read_numbers(path: Path) -> dict[str, float]:
    """What the table says of a collection. Raises GrpoError for a file that is gone or none."""
    return dict(_read(path)[1].numbers)


def _read(path: Path) -> tuple[dict[str, Tensor], CollectionSummary]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("advantages", "old", "ref")}
            summary = msgspec.json.decode((file.metadata() or {})[_SUMMARY], type=CollectionSummary)
    except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
        raise GrpoError(f"{path}: no scores of a collection ({error}); delete its folder to fly it again") from error
    return tensors, summary


def padded(scores: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of samples side by side: float32 [B, N]."""
    return torch.nn.utils.rnn.pad_sequence(list(scores), batch_first=True)
