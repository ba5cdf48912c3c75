"""What VAE training adds to the VAE: straight-through codes, and motion that can be read from codes and features.

A VAE trained for reconstruction alone leaves ego-motion in details that the coarse scales do not carry; then neither
the text can predict it nor the action head read it. Readouts of motion, from the summed codes and from the decoder
features, put it where the world model and the action head need it; a coarse optical flow is the dense part of that
lesson. Scales may be dropped from the fine end, so that the coarse ones carry the most.

Legend: B rows, F frames, T latent frames, C latent channels, h w latent grid.
Source: spec/video_vae.md; spec/training.md 8.3, 8.6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.quantizer import add_codes, encode_bits
from worldvln_edge.scale_schedule import ScaleSchedule

LATENT_POWER = 0.1
"""Mean square of a latent that training aims at; the summed codes of a few scales reach about this."""


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
