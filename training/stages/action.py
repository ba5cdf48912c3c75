"""Latent to action (`action`): windows of decoder features to motions.

The latent head is trained on features of true latents and of predicted ones: in flight it only ever sees predicted
ones behind the observed frames, and a head that never met them copies their errors.

Legend: N flights, F frames of a flight, Cf feature channels, h w feature rows and columns, M windows of a batch.
Source: spec/training.md 4.1-4.3, 8.6; spec/action_decoder.md 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ModelConfig
from worldvln_edge.models.action_decoder import LatentActionHead
from worldvln_edge.models.quantizer import encode_bits
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.backbone import TextBatch
from worldvln_edge.training.stages.flight_data import FlightSet
from worldvln_edge.training.stages.loop import Losses, OptimiserConfig, optimise, step_generator
from worldvln_edge.training.stages.prediction import predict_clip


@dataclass(frozen=True, kw_only=True)
class MotionWeights:
    rotation: float = 1.0  # published: 0.05 -> 0.25; the small presets learn all columns alike
    xy: float = 1.0
    z: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ActionTrainingConfig:
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=1.5e-3, steps=4000, weight_decay=0.05)
    )
    windows: int = 64
    predicted_share: float = 0.6  # of the windows of a latent-head batch
    weights: MotionWeights = field(default_factory=MotionWeights)


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Decoder features of flights, once from true latents and once from predicted ones."""

    true_NCFhw: Tensor  # float16, CPU, F = num_frames
    predicted_NCFhw: Tensor  # float16, F = num_frames - 1: frames 2..num_frames, each clip predicted from real ones


@torch.no_grad()
def observed_codes(latents_NCTHW: Tensor, schedule: ScaleSchedule, config: ModelConfig) -> Tensor:
    """Summed codes of true latents, clip by clip: as the input."""
    clips = [encode_bits(latents_NCTHW[:, :, clip.frame_slice], clip, config.world_model)[1] for clip in schedule.clips]
    return torch.cat(clips, 2)


@torch.no_grad()
def cache_features(
    vae: VideoVAE,
    model: WorldModel,
    text_encoder: TextEncoder,
    config: ModelConfig,
    latents_NCTHW: Tensor,
    text: TextBatch,
    *,
    seed: int,
    batch: int = 16,
) -> FeatureCache:
    """Decode true and predicted latents of flights to last up-block features."""
    schedule = ScaleSchedule(config.schedule, latents_NCTHW.shape[2])
    stride = config.video_vae.temporal_stride
    true_parts, predicted_parts = [], []
    for first in range(0, len(latents_NCTHW), batch):
        rows = torch.arange(first, min(first + batch, len(latents_NCTHW)))
        latents = latents_NCTHW[rows].to(next(vae.parameters()).device)
        features, lengths = text.features(text_encoder, rows)
        generator = step_generator(seed, first)
        state, true_clips, predicted_clips = None, [], []
        codes = observed_codes(latents, schedule, config)
        for clip in schedule.clips:
            if clip.index > 0:
                sampled = predict_clip(model, config, schedule, clip.index, latents, features, lengths, generator)
                peeked, _ = vae.decode_features(sampled, state)
                predicted_clips.append(peeked.half().cpu())
            committed, state = vae.decode_features(codes[:, :, clip.frame_slice], state)
            true_clips.append(committed.half().cpu())
        true_parts.append(torch.cat(true_clips, 2))
        predicted_parts.append(torch.cat(predicted_clips, 2))
        assert true_parts[-1].shape[2] == 1 + (latents.shape[2] - 1) * stride
    return FeatureCache(true_NCFhw=torch.cat(true_parts), predicted_NCFhw=torch.cat(predicted_parts))


def motion_loss(predicted_M36: Tensor, target_M36: Tensor, weights: MotionWeights) -> Tensor:
    """Weighted mean squared error of normalised deltas (spec/training.md 4.3)."""
    squared = (predicted_M36 - target_M36) ** 2
    return (
        weights.rotation * squared[..., :3].mean()
        + weights.xy * squared[..., 3:5].mean()
        + weights.z * squared[..., 5].mean()
    )


def normalised_deltas(flights: FlightSet, stats: LabelStats) -> Tensor:
    """Labels of all flights, normalised: float32 [N, F-1, 6]."""
    return (torch.from_numpy(flights.deltas) - torch.from_numpy(stats.mean)) / torch.from_numpy(stats.std)


def train_latent_head(
    head: LatentActionHead,
    config: ModelConfig,
    flights: FlightSet,
    cache: FeatureCache,
    stats: LabelStats,
    training: ActionTrainingConfig,
    curve_file: Path,
    *,
    seed: int,
) -> None:
    """Train adapter and TimesFormer in place on random windows."""
    window, step_frames, left = head.config.latent_head.window, config.horizon.step, head.config.left_context
    labels = normalised_deltas(flights, stats)
    device = next(head.parameters()).device
    flights_count, frames_count = cache.true_NCFhw.shape[0], cache.true_NCFhw.shape[2]
    head.train()

    def losses_of_step(step: int) -> Losses:
        generator = step_generator(seed, step)
        rows = torch.randint(flights_count, (training.windows,), generator=generator)
        starts = torch.randint(frames_count - window + 1, (training.windows,), generator=generator)
        frames = starts[:, None] + torch.arange(window)
        source = cache.true_NCFhw[rows[:, None], :, frames].float()
        is_predicted = torch.rand(training.windows, generator=generator) < training.predicted_share
        # A window of a flight sees up to `left` observed frames and predicted ones of one segment behind them.
        segments = torch.randint(config.horizon.segments, (training.windows,), generator=generator)
        observed = segments * step_frames  # 0-based index of the last observed frame
        first = torch.clamp(observed - left + 1, min=0)
        span = observed + step_frames - window + 1 - first + 1
        offsets = (torch.rand(training.windows, generator=generator) * span).long()
        mixed_frames = (first + offsets)[:, None] + torch.arange(window)
        beyond = mixed_frames > observed[:, None]
        mixed = torch.where(
            beyond[..., None, None, None],
            cache.predicted_NCFhw[rows[:, None], :, (mixed_frames - 1).clamp(min=0)],
            cache.true_NCFhw[rows[:, None], :, mixed_frames],
        ).float()
        frames = torch.where(is_predicted[:, None], mixed_frames, frames)
        source = torch.where(is_predicted[:, None, None, None, None], mixed, source)
        source, target = source.to(device), labels[rows[:, None], frames[:, :-1]].to(device)
        tokens = head.tokens(source.transpose(1, 2)).unflatten(0, (training.windows, window))
        predicted = head.tsformer(tokens).unflatten(-1, (window - 1, 6))
        losses = {"loss": motion_loss(predicted, target, training.weights)}
        for name, chosen in (("true", ~is_predicted), ("predicted", is_predicted)):
            if chosen.any():
                losses[f"mse_{name}"] = ((predicted - target)[chosen.to(device)] ** 2)[..., [0, 3, 4, 5]].mean()
        return losses

    optimise("action", head.parameters(), training.optimiser, losses_of_step, curve_file)
    head.eval()
