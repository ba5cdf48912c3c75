"""Which steps of the world model are the policy: what is run for a generated clip, what is drawn, and what is scored.

A bit is drawn if and only if it is scored. Of the other scales each bit is the likelier one, a deterministic part of
the environment, so the gradient of what is scored is the gradient of the return.
Source: spec/training.md 5.4 (repetitions), 5.9 items 1 and 2.
"""

from __future__ import annotations

from typing import Literal

from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.scale_schedule import Clip, ScaleSchedule, ScaleStep

PolicyScales = Literal["semantic", "all"] | int
"""Scales whose bits are drawn and scored; a number: so many of the first, the coarsest."""
Repetitions = Literal["last", "all"]
"""`last`: a generated scale is run once, at the position of its last repetition. `all`: as often as it is served; every
repetition is drawn and scored with the state that produced it."""


def clip_of_segment(schedule: ScaleSchedule, segment: int) -> Clip:
    """The clip that is generated in segment 0, 1, ...: the one behind the `segment + 1` observed clips."""
    return schedule.clips[segment + 1]


def rollout_steps(clip: Clip, repetitions: Repetitions) -> tuple[ScaleStep, ...]:
    """Steps that are run to generate a clip, in order: one tensor of `SegmentTrace.bits` belongs to each."""
    return tuple(step for step in clip.steps if repetitions == "all" or step.is_last_repetition)


def is_policy_step(step: ScaleStep, policy_scales: PolicyScales) -> bool:
    """Whether the bits of a step are drawn and scored; else the likelier ones are taken."""
    if isinstance(policy_scales, int):
        return step.scale < policy_scales
    return policy_scales == "all" or step.is_semantic


def check_policy_scales(config: ModelConfig, policy_scales: PolicyScales) -> None:
    """Raise ConfigError for more scales than a clip has, or none."""
    scales = config.schedule.scales_per_clip
    if isinstance(policy_scales, int) and not 1 <= policy_scales <= scales:
        raise ConfigError(f"grpo.policy_scales must be 1..{scales} for {config.name}, found {policy_scales}")


def flight_schedule(config: ModelConfig) -> ScaleSchedule:
    """Schedule of a whole flight.

    Raises:
        ConfigError: a segment is not exactly one clip.
    """
    clip_frames = config.video_vae.temporal_stride * config.schedule.frames_inner_clip
    if config.horizon.step != clip_frames:
        raise ConfigError(
            f"{config.name}: a segment has {config.horizon.step} frames and a clip {clip_frames}; rollouts need one "
            "clip a segment, so set horizon.step to the frames of a clip"
        )
    return ScaleSchedule(config.schedule, 1 + config.horizon.segments * config.schedule.frames_inner_clip)
