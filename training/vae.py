"""Video VAE of the small presets: reconstruction, binary quantisation, and motion that can be read from the codes.

A VAE trained for reconstruction alone leaves ego-motion in details that the coarse scales do not carry; then neither
the text can predict it nor the action head read it. Two small readouts (from the summed codes, and linearly from the
decoder features) put the motion where the world model and the action head need it. Scales are dropped at random from
the fine end, so that the coarse ones carry the most.

Legend: B rows, F frames, T latent frames, C latent channels.
Source: spec/video_vae.md; spec/training.md 8.3, 8.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.quantizer import add_codes, encode_bits
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.flight_data import FlightSet
from worldvln_edge.training.loop import Losses, OptimiserConfig, optimise, step_generator


@dataclass(frozen=True, kw_only=True)
class VaeTrainingConfig:
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=2e-3, steps=1500, weight_decay=0.01)
    batch: int = 6
    window_frames: int = 17
    raw_share: float = 0.15  # of the rows: decode the features before quantisation
    scale_drop: float = 0.35  # of the quantised rows: keep only the first scales, at least one
    commitment: float = 0.25
    motion_codes: float = 0.3
    motion_features: float = 0.3


class MotionReadouts(nn.Module):
    """Readouts that are trained beside the VAE and thrown away with the run."""

    def __init__(self, config: ModelConfig, columns: int):
        super().__init__()
        vae = config.video_vae
        rows, cols = config.schedule.latent_hw
        self.stride, self.columns = vae.temporal_stride, columns
        self.pool_hw = (rows, cols)
        self.codes = nn.Sequential(
            nn.Linear(vae.raw_channels * rows * cols, 192), nn.SiLU(), nn.Linear(192, self.stride * columns)
        )
        self.features = nn.Linear(2 * vae.feature_channels * rows * cols, columns)

    def from_codes(self, codes_BCTHW: Tensor) -> Tensor:
        """Motion of the frames behind every latent but the first: [B, (T-1)*stride, columns]."""
        latents = codes_BCTHW[:, :, 1:].transpose(1, 2).flatten(2)
        return self.codes(latents).unflatten(-1, (self.stride, self.columns)).flatten(1, 2)

    def from_features(self, features_BCFhw: Tensor) -> Tensor:
        """Motion from each frame to the next, read from both: [B, F-1, columns]."""
        pooled = F.adaptive_avg_pool3d(features_BCFhw, (features_BCFhw.shape[2], *self.pool_hw))
        frames = pooled.transpose(1, 2).flatten(2)
        return self.features(torch.cat((frames[:, :-1], frames[:, 1:]), -1))


def frames_to_video(frames_BFHW3: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] -> float32 [B, 3, F, H, W] in [-1, 1]."""
    return frames_BFHW3.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def quantise_straight_through(
    features_BCTHW: Tensor, schedule: ScaleSchedule, config: ModelConfig, scales_kept: list[int]
) -> tuple[Tensor, Tensor]:
    """Summed codes with the gradient of the features.

    Args:
        features_BCTHW: raw features of whole clips.
        schedule: of that many latent frames.
        config: bits and channels.
        scales_kept: per row how many scales of every clip count, coarse first.

    Returns:
        (codes of the kept scales with a straight-through gradient, full codes without gradient), both as the features.
    """
    full, kept = [], []
    for clip in schedule.clips:
        target = features_BCTHW[:, :, clip.frame_slice].detach()
        with torch.no_grad():
            bits, summed = encode_bits(target, clip, config.world_model)
            partial = torch.zeros_like(summed)
            for step, step_bits in zip(clip.steps, bits, strict=True):
                counts = torch.tensor([float(step.scale < n) for n in scales_kept], device=target.device)
                added = add_codes(torch.zeros_like(summed), step_bits)
                partial = partial + added * counts[:, None, None, None, None]
        full.append(summed)
        kept.append(partial)
    codes = torch.cat(kept, 2)
    return features_BCTHW + (codes - features_BCTHW).detach(), torch.cat(full, 2)


def train_vae(
    vae: VideoVAE, config: ModelConfig, flights: FlightSet, training: VaeTrainingConfig, curve_file: Path, *, seed: int
) -> None:
    """Train `vae` in place on random windows of the flights."""
    stats = flights.label_stats()
    moving = torch.tensor(stats.std) > 1e-4
    labels = ((torch.from_numpy(flights.deltas) - torch.tensor(stats.mean)) / torch.tensor(stats.std))[..., moving]
    readouts = MotionReadouts(config, int(moving.sum()))
    frames = torch.from_numpy(flights.frames)
    latent_frames = 1 + (training.window_frames - 1) // config.video_vae.temporal_stride
    schedule = ScaleSchedule(config.schedule, latent_frames)
    scales = config.schedule.scales_per_clip
    last_start = frames.shape[1] - training.window_frames
    vae.train()

    def losses_of_step(step: int) -> Losses:
        generator = step_generator(seed, step)
        rows = torch.randint(len(flights), (training.batch,), generator=generator)
        starts = torch.randint(last_start + 1, (training.batch,), generator=generator)
        window = starts[:, None] + torch.arange(training.window_frames)
        video = frames_to_video(frames[rows[:, None], window])
        motion = labels[rows[:, None], window[:, :-1]]
        h, _ = vae.encode(video)
        raw = vae.raw_features(h)
        drops = torch.rand(training.batch, generator=generator) < training.scale_drop
        shorter = torch.randint(1, scales, (training.batch,), generator=generator)
        kept = [int(n) if dropped else scales for n, dropped in zip(shorter, drops, strict=True)]
        codes, full = quantise_straight_through(raw, schedule, config, kept)
        is_raw = torch.rand(training.batch, generator=generator) < training.raw_share
        decoded = torch.where(is_raw[:, None, None, None, None], raw, codes)
        features, _ = vae.decode_features(decoded)
        pixels, _ = vae.decode_pixels(features, decoded)
        losses = {
            "reconstruction": F.mse_loss(pixels, video),
            "commitment": F.mse_loss(raw, full),
            "motion_codes": F.mse_loss(readouts.from_codes(codes), motion),
            "motion_features": F.mse_loss(readouts.from_features(features), motion),
        }
        total = (
            losses["reconstruction"]
            + training.commitment * losses["commitment"]
            + training.motion_codes * losses["motion_codes"]
            + training.motion_features * losses["motion_features"]
        )
        return {"loss": total, **losses}

    parameters = [*vae.parameters(), *readouts.parameters()]
    optimise("vae", parameters, training.optimiser, losses_of_step, curve_file)
    vae.eval()


@torch.no_grad()
def encode_flights(vae: VideoVAE, flights: FlightSet, *, batch: int = 16) -> Tensor:
    """Raw features of whole flights: float32 [N, C, T, H, W]."""
    vae.eval()
    parts = []
    for first in range(0, len(flights), batch):
        video = frames_to_video(torch.from_numpy(flights.frames[first : first + batch]))
        h, _ = vae.encode(video)
        parts.append(vae.raw_features(h))
    return torch.cat(parts)
