"""Video VAE of the small presets: reconstruction, binary quantisation, and motion that can be read from the codes.

A VAE trained for reconstruction alone leaves ego-motion in details that the coarse scales do not carry; then neither
the text can predict it nor the action head read it. Readouts of motion, from the summed codes and from the decoder
features, put it where the world model and the action head need it; a coarse optical flow is the dense part of that
lesson. The encoder starts with the readouts alone, on short windows: motion is what takes longest to learn, and that
way it costs a third. Scales are dropped at random from the fine end, so that the coarse ones carry the most.

Legend: B rows, F frames, T latent frames, C latent channels, h w latent grid.
Source: spec/video_vae.md; spec/training.md 8.3, 8.6.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.models.quantizer import add_codes, encode_bits
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.flight_data import FlightSet
from worldvln_edge.training.stages.loop import Losses, OptimiserConfig, optimise, step_generator
from worldvln_edge.training.stages.optical_flow import coarse_flow

_LATENT_POWER = 0.1  # mean square of a latent; the summed codes of a few scales reach about this


@dataclass(frozen=True, kw_only=True)
class VaeTrainingConfig:
    encoder: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=4e-4, steps=700, final_share=0.5)
    )
    encoder_batch: int = 32
    encoder_window: int = 5  # frames
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(learning_rate=5e-4, steps=1000))
    batch: int = 6
    window: int = 17  # frames
    raw_share: float = 0.15  # of the rows: decode the features before quantisation
    scale_drop: float = 0.35  # of the quantised rows: keep only the first scales, at least one
    commitment: float = 0.25
    flow_weight: float = 0.2
    motion_weight: float = 0.2


class MotionReadouts(nn.Module):
    """Linear readouts that are trained beside the VAE and thrown away with the run."""

    def __init__(self, config: ModelConfig, columns: int):
        super().__init__()
        vae = config.video_vae
        self.grid_hw = config.schedule.latent_hw
        cells = self.grid_hw[0] * self.grid_hw[1]
        self.stride, self.columns = vae.temporal_stride, columns
        self.codes_motion = nn.Linear(vae.raw_channels * cells, self.stride * columns)
        self.codes_flow = nn.Conv3d(vae.raw_channels, self.stride * 2, 1)
        self.features_motion = nn.Linear(vae.feature_channels * cells, columns)
        self.features_flow = nn.Conv3d(vae.feature_channels, 2, 1)

    def from_codes(self, codes_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Motion [B, F-1, columns] and flow [B, F-1, 2, h, w] of the frames behind every latent but the first."""
        later = codes_BCTHW[:, :, 1:]
        motion = self.codes_motion(later.transpose(1, 2).flatten(2)).unflatten(-1, (self.stride, self.columns))
        flow = self.codes_flow(later).unflatten(1, (self.stride, 2)).permute(0, 3, 1, 2, 4, 5)
        return motion.flatten(1, 2), flow.flatten(1, 2)

    def from_features(self, features_BCFhw: Tensor) -> tuple[Tensor, Tensor]:
        """The same, read from the features of the later frame of each pair."""
        pooled = F.adaptive_avg_pool3d(features_BCFhw[:, :, 1:], (features_BCFhw.shape[2] - 1, *self.grid_hw))
        motion = self.features_motion(pooled.transpose(1, 2).flatten(2))
        return motion, self.features_flow(pooled).transpose(1, 2)


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


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Random windows of flights with their motion and flow, both in units of their deviation."""

    frames_NFHW3: Tensor
    motion_NFc: Tensor
    flow_deviation: float
    grid_hw: tuple[int, int]
    device: torch.device  # where the windows go; the flights stay where they are

    def draw(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        count, frames = self.frames_NFHW3.shape[:2]
        rows = torch.randint(count, (batch, 1), generator=generator)
        window = torch.randint(frames - length + 1, (batch, 1), generator=generator) + torch.arange(length)
        pixels = self.frames_NFHW3[rows, window].to(self.device)
        flow = coarse_flow(pixels, self.grid_hw) / self.flow_deviation
        return frames_to_video(pixels), self.motion_NFc[rows, window[:, :-1]].to(self.device), flow


def train_vae(
    vae: VideoVAE, config: ModelConfig, flights: FlightSet, training: VaeTrainingConfig, curve_file: Path, *, seed: int
) -> None:
    """Train `vae` in place on random windows of the flights.

    Raises:
        ConfigError: a window that is longer than the flights or does not end with a latent frame.
    """
    stride, longest = config.video_vae.temporal_stride, flights.frames.shape[1]
    for name, window in (("window", training.window), ("encoder_window", training.encoder_window)):
        if window > longest or window <= stride or (window - 1) % stride:
            raise ConfigError(
                f"{name} must be 1 + {stride}*k frames, k >= 1, and at most the {longest} of a flight; found {window}"
            )
    stats = flights.label_stats()
    moving = torch.from_numpy(stats.std) > 1e-4  # roll and pitch do not move in the simulator
    motion = ((torch.from_numpy(flights.deltas) - torch.from_numpy(stats.mean)) / torch.from_numpy(stats.std))[
        ..., moving
    ]
    frames, grid_hw = torch.from_numpy(flights.frames), config.schedule.latent_hw
    windows = _Windows(
        frames_NFHW3=frames,
        motion_NFc=motion,
        flow_deviation=float(coarse_flow(frames[: min(64, len(frames))], grid_hw).std()) + 1e-6,
        grid_hw=grid_hw,
        device=next(vae.parameters()).device,
    )
    readouts = MotionReadouts(config, int(moving.sum())).to(windows.device)
    vae.train()
    _train_encoder(vae, readouts, windows, training, curve_file, seed=seed)
    _train_whole(vae, readouts, windows, config, training, curve_file, seed=seed + 500)
    vae.eval()


def _train_encoder(
    vae: VideoVAE,
    readouts: MotionReadouts,
    windows: _Windows,
    training: VaeTrainingConfig,
    curve_file: Path,
    *,
    seed: int,
) -> None:
    def losses_of_step(step: int) -> Losses:
        video, motion, flow = windows.draw(training.encoder_batch, training.encoder_window, step_generator(seed, step))
        raw = vae.raw_features(vae.encode(video)[0])
        read_motion, read_flow = readouts.from_codes(raw)
        losses = {"flow_codes": F.mse_loss(read_flow, flow), "motion_codes": F.mse_loss(read_motion, motion)}
        # A unit of spread in the latents keeps them in the range that the binary codes can follow.
        spread = F.mse_loss(raw.square().mean(), raw.new_tensor(_LATENT_POWER))
        return {"loss": losses["flow_codes"] + training.motion_weight * losses["motion_codes"] + spread, **losses}

    parameters = [*vae.encoder.parameters(), *vae.proj_down.parameters(), *readouts.parameters()]
    optimise("vae_encoder", parameters, training.encoder, losses_of_step, curve_file)


def _train_whole(
    vae: VideoVAE,
    readouts: MotionReadouts,
    windows: _Windows,
    config: ModelConfig,
    training: VaeTrainingConfig,
    curve_file: Path,
    *,
    seed: int,
) -> None:
    schedule = ScaleSchedule(config.schedule, 1 + (training.window - 1) // config.video_vae.temporal_stride)
    scales = config.schedule.scales_per_clip

    def losses_of_step(step: int) -> Losses:
        generator = step_generator(seed, step)
        video, motion, flow = windows.draw(training.batch, training.window, generator)
        raw = vae.raw_features(vae.encode(video)[0])
        drops = torch.rand(training.batch, generator=generator) < training.scale_drop
        shorter = torch.randint(1, scales, (training.batch,), generator=generator)
        kept = [int(n) if dropped else scales for n, dropped in zip(shorter, drops, strict=True)]
        codes, full = quantise_straight_through(raw, schedule, config, kept)
        is_raw = (torch.rand(training.batch, generator=generator) < training.raw_share).to(raw.device)
        decoded = torch.where(is_raw[:, None, None, None, None], raw, codes)
        features, _ = vae.decode_features(decoded)
        pixels, _ = vae.decode_pixels(features, decoded)
        codes_motion, codes_flow = readouts.from_codes(codes)
        features_motion, features_flow = readouts.from_features(features)
        losses = {
            "reconstruction": F.mse_loss(pixels, video),
            "commitment": F.mse_loss(raw, full),
            "flow_codes": F.mse_loss(codes_flow, flow),
            "flow_features": F.mse_loss(features_flow, flow),
            "motion_codes": F.mse_loss(codes_motion, motion),
            "motion_features": F.mse_loss(features_motion, motion),
        }
        total = losses["reconstruction"] + training.commitment * losses["commitment"]
        total = total + training.flow_weight * (losses["flow_codes"] + losses["flow_features"])
        total = total + training.motion_weight * (losses["motion_codes"] + losses["motion_features"])
        return {"loss": total, **losses}

    optimise("vae", [*vae.parameters(), *readouts.parameters()], training.optimiser, losses_of_step, curve_file)


@torch.no_grad()
def encode_flights(vae: VideoVAE, flights: FlightSet, *, batch: int = 16) -> Tensor:
    """Raw features of whole flights, on the CPU: float32 [N, C, T, H, W]."""
    vae.eval()
    device = next(vae.parameters()).device
    parts = []
    for first in range(0, len(flights), batch):
        video = frames_to_video(torch.from_numpy(flights.frames[first : first + batch]).to(device))
        h, _ = vae.encode(video)
        parts.append(vae.raw_features(h).cpu())
    return torch.cat(parts)
