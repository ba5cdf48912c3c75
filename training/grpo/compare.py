"""Flies checkpoints on the same held-out tasks and seeds, which says whether GRPO was worth it.

Every checkpoint flies every task as often, guidance 1 and temperature 1, as in training. What is flown is kept flight
by flight in the work folder, so a comparison that was broken off goes on.
Source: spec/training.md 8.4 (paired by task and seed, standard error over tasks).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch

from worldvln_edge.models.checkpoint_source import load_source, open_any
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.collection import Collection, CollectionConfig
from worldvln_edge.training.grpo.comparison import ComparedPolicy, Comparison
from worldvln_edge.training.grpo.early_stopping import early_stopping_rules
from worldvln_edge.training.grpo.fly_collection import collect
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.held_out import HeldOutResult, judge_held_out, paired_difference
from worldvln_edge.training.grpo.objective import ObjectiveConfig, sample_losses
from worldvln_edge.training.grpo.policy_batch import PolicyBatchMaker
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.grpo.run_collections import MakeFlier
from worldvln_edge.training.grpo.run_table import TABLE_FILE
from worldvln_edge.training.grpo.scored_collection import GrpoError, padded
from worldvln_edge.training.grpo.scoring import score_samples
from worldvln_edge.training.grpo.stopping_saving import rules_made_for, stopping_saving
from worldvln_edge.training.stages.backbone_network import FrozenTextFeatures
from worldvln_edge.training.trainer.loss_log import read_curve

_KEPT_PROMPTS = 1024


def compare_checkpoints(
    checkpoints: Sequence[Path],
    tasks: Sequence[Task],
    config: GrpoConfig,
    make_flier: MakeFlier,
    work: Path,
    *,
    device: torch.device,
    trust_pickle: bool = False,
    show: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Fly and compare.

    Args:
        checkpoints: at least two of one preset; the first is what the others are compared with.
        tasks: each is flown `config.evaluation.rollouts` times.
        config: policy scales, repetitions, rewards.
        make_flier: where the policies fly.
        work: flights and results.
        device: of the networks.
        trust_pickle: see `open_any`.
        show: takes lines on how it goes.

    Raises:
        GrpoError: one checkpoint alone, or two presets.
        CheckpointError, CollectionError, RewardError: see there.
    """
    if len(checkpoints) < 2:
        raise GrpoError("comparing takes at least two checkpoints; the first is what the others are compared with")
    rules = () if config.early_stopping else rules_made_for(tasks, early_stopping_rules())
    first: Checkpoint | None = None
    start: HeldOutResult | None = None
    found: list[ComparedPolicy] = []
    for path in checkpoints:
        show(f"flying {path}")
        loaded = load_source(open_any(path, trust_pickle=trust_pickle))
        loaded.model.to(device).requires_grad_(False)
        if first is None:
            first = loaded
        elif first.config != loaded.config:
            raise GrpoError(
                f"{path} is of {loaded.config.name}, {checkpoints[0]} of {first.config.name}, or sizes differ"
            )
        flown = _fly(loaded, tasks, config, make_flier, work)
        judge = partial(
            judge_held_out, report=flown.report, tasks=tasks, config=config.reward, step=loaded.config.horizon.step
        )
        result = judge(flown.traces())
        start = start or result
        is_first = loaded is first
        row = _last_row(path)
        found.append(
            ComparedPolicy(
                checkpoint=str(path),
                flights=len(result.flights),
                failed=result.failed,
                reward=result.reward,
                success=result.success,
                reward_difference=None if is_first else paired_difference(result, start),
                success_difference=None if is_first else paired_difference(result, start, "succeeded"),
                k3=None if is_first else _k3(loaded, first, flown, config),
                clipped=row.get("clipped"),
                environment_steps=row.get("environment_steps_total"),
                stopping=stopping_saving(flown.traces(), result, {task.task_id: task for task in tasks}, rules, judge)
                if rules
                else None,
            )
        )
    return Comparison(tasks=len(tasks), rollouts=config.evaluation.rollouts, policies=tuple(found))


def _tokenizer(loaded: Checkpoint) -> PromptTokenizer:
    return PromptTokenizer.load(loaded.tokenizer_file, loaded.config.world_model.text_max_tokens)


def _fly(
    loaded: Checkpoint, tasks: Sequence[Task], config: GrpoConfig, make_flier: MakeFlier, work: Path
) -> Collection:
    policy = RolloutPolicy(
        loaded.model,
        loaded.stats.latent_head,
        _tokenizer(loaded),
        policy_scales=config.policy_scales,
        repetitions=config.repetitions,
        rows=config.rows,
    )
    chosen = hashlib.sha256(msgspec.json.encode([list(tasks), config.evaluation.rollouts])).hexdigest()
    folder = work / f"{policy.digest[:16]}-{chosen[:8]}"
    flown = collect(folder, make_flier(policy), tasks, CollectionConfig(candidates=config.evaluation.rollouts))
    assert flown is not None  # nobody asks it to stop
    return flown


def _k3(new: Checkpoint, first: Checkpoint, flown: Collection, config: GrpoConfig) -> float:
    """Mean k3 per bit over all segments that `new` flew."""
    maker = PolicyBatchMaker(new.config, _tokenizer(new))
    total, count = 0.0, 0
    texts = [FrozenTextFeatures(one.model.text_encoder, kept=_KEPT_PROMPTS) for one in (new, first)]
    for trace in flown.traces():
        samples = [(trace, segment) for segment in range(len(trace.segments))]
        own, other = (
            score_samples(one.model.world_model, maker, text, samples, together=config.micro_samples)
            for one, text in zip((new, first), texts, strict=True)
        )
        is_bit = padded([torch.ones_like(score) for score in own]).bool()
        losses = sample_losses(
            padded(own), padded(own), padded(other), is_bit, torch.zeros(len(own)), ObjectiveConfig()
        )
        total, count = total + float(losses.k3.double().sum()), count + len(own)
    return total / count


def _last_row(checkpoint: Path) -> dict[str, float]:
    """Last row of the table of a GRPO run whose output this is, empty where it is none."""
    try:
        rows = [row for row in read_curve(checkpoint / TABLE_FILE) if "clipped" in row]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return rows[-1] if rows else {}
