"""Traces of flights of a random tiny model, without a simulator: what it saw is noise, and it flew as it planned."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import torch
from small_models import STATS, WORDS, random_frames
from tokenizers import Tokenizer

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.poses import integrate_actions
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.candidates import Candidate, candidates_of
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.grpo.trace import HORIZON, FlightTrace, SegmentTrace
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer

INSTRUCTIONS = ("fly forward to the red tower", "turn left 5 m", "climb", "fly back .")


def tiny_tokenizer(config: ModelConfig) -> PromptTokenizer:
    words = build_word_tokenizer(WORDS, "<<<t=3s>>>", config.text_encoder.vocabulary)
    return PromptTokenizer(Tokenizer.from_str(words.to_str()), config.world_model.text_max_tokens)


def fly(
    model: WorldVLN,
    tokenizer: PromptTokenizer,
    *,
    candidates: int = 2,
    tasks: int = 2,
    policy_scales: PolicyScales = "semantic",
    repetitions: Repetitions = "last",
) -> list[FlightTrace]:
    """`candidates` flights of each of `tasks` tasks to their horizon, task by task."""
    policy = RolloutPolicy(
        model,
        STATS.latent_head,
        tokenizer,
        policy_scales=policy_scales,
        repetitions=repetitions,
        rows=candidates * tasks,
    )
    told = [
        expert_task(model.config, task_id=f"task-{i}", instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)])
        for i in range(tasks)
    ]
    return fly_together(policy, candidates_of(told, candidates))


def fly_together(policy: RolloutPolicy, flights: Sequence[Candidate]) -> list[FlightTrace]:
    """Flights at once; what one sees depends on its task, and behind the start on its seed."""
    config = policy.config
    batch = policy.begin([one.task.instruction for one in flights], [one.seed for one in flights])
    segments: list[list[SegmentTrace]] = [[] for _ in flights]
    poses = [np.array(one.task.initial_pos) for one in flights]
    latents = [torch.zeros(0) for _ in flights]
    for index in range(config.horizon.segments):
        count = 1 if index == 0 else config.horizon.step
        batch.observe(
            {
                f: np.stack(random_frames(config, count, seed=sum(one.task.task_id.encode()) + index * one.seed))
                for f, one in enumerate(flights)
            }
        )
        for flight, planned in enumerate(batch.plan()):
            flown = integrate_actions(poses[flight], planned.actions)
            segments[flight].append(
                SegmentTrace(
                    bits=planned.bits,
                    log_probs=planned.log_probs,
                    actions=planned.actions,
                    poses=np.concatenate([poses[flight][None], flown]),
                )
            )
            poses[flight] = flown[-1]
            latents[flight] = batch.latents(flight)
    return [
        FlightTrace(
            task_id=one.task.task_id,
            group_id=one.group_id,
            candidate_id=one.candidate_id,
            seed=one.seed,
            attempt=one.attempt,
            prompt=policy.prompt(one.task.instruction),
            checkpoint_digest=policy.digest,
            policy_scales=policy.policy_scales,
            repetitions=policy.repetitions,
            latents=latents[flight],
            segments=tuple(segments[flight]),
            end_reason=HORIZON,
            collided=False,
            environment_steps=config.horizon.num_frames - 1,
            horizon_steps=config.horizon.num_frames - 1,
        )
        for flight, one in enumerate(flights)
    ]


def expert_task(config: ModelConfig, *, task_id: str = "task-0", turn_deg: float = 0.0, **fields) -> Task:
    """A task whose expert flies ahead from where `fly` starts, 20 cm a step."""
    start = np.array([100.0, 50.0, 200.0, 0.0, 30.0, 0.0])
    actions = np.tile([20.0, 0.0, 0.0, 0.0, turn_deg, 0.0], (config.horizon.num_frames - 1, 1))
    path = np.concatenate([start[None], integrate_actions(start, actions)])
    task = Task(
        task_id=task_id,
        instruction=INSTRUCTIONS[0],
        initial_pos=tuple(start.tolist()),
        end_pos=tuple(path[-1].tolist()),
        reference_path_raw=tuple(tuple(row) for row in path.tolist()),
    )
    return msgspec.structs.replace(task, **fields)


def ended_after(trace: FlightTrace, segments: int) -> FlightTrace:
    """The same flight, ended by a rule behind some of its segments."""
    kept = trace.segments[:segments]
    steps = sum(len(segment.actions) for segment in kept)
    return replace(trace, segments=kept, environment_steps=steps, end_reason="stall")


def flown_along(trace: FlightTrace, poses_T6: np.ndarray, *, collided: bool = False) -> FlightTrace:
    """The same flight along other poses."""
    segments, first = [], 0
    for segment in trace.segments:
        rows = len(segment.actions)
        segments.append(replace(segment, poses=np.array(poses_T6[first : first + rows + 1], np.float64)))
        first += rows
    return replace(trace, segments=tuple(segments), collided=collided)
