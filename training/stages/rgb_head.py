"""RGB head (`rgb_head`): windows of real frames to motions.

Motion between two frames is a product of what the patches show and of how they change. From a few numbers a frame a
small head does not find it (its loss stays at that of the mean), so the patch tokens behind every block also read out
the coarse optical flow of their cell while it trains.

Legend: M windows of a batch, T frames of a window, N patch tokens of a frame = h*w, D width.
Source: spec/action_decoder.md 8; spec/training.md 4.3, 8.6.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.models.action_decoder import RgbActionHead
from worldvln_edge.training.stages.action import MotionWeights, motion_loss, normalised_deltas
from worldvln_edge.training.stages.flight_data import FlightSet
from worldvln_edge.training.stages.loop import Losses, OptimiserConfig, optimise, step_generator
from worldvln_edge.training.stages.optical_flow import coarse_flow


@dataclass(frozen=True, kw_only=True)
class RgbTrainingConfig:
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=6e-4, steps=5000, weight_decay=0.02)
    )
    windows: int = 32
    flow_weight: float = 1.0  # of the flow readout behind every block
    weights: MotionWeights = field(default_factory=MotionWeights)


def train_rgb_head(
    head: RgbActionHead,
    flights: FlightSet,
    stats: LabelStats,
    training: RgbTrainingConfig,
    curve_file: Path,
    *,
    seed: int,
) -> None:
    """Train the RGB head in place on random windows of real frames."""
    config, device = head.config.rgb_head, next(head.parameters()).device
    grid_hw = (config.image_hw[0] // config.patch, config.image_hw[1] // config.patch)
    labels, frames_NFHW3 = normalised_deltas(flights, stats), torch.from_numpy(flights.frames)
    flow_deviation = float(coarse_flow(frames_NFHW3[: min(64, len(flights))], grid_hw).std()) + 1e-6
    mean = torch.tensor(head.config.rgb_mean, device=device)[:, None, None]
    std = torch.tensor(head.config.rgb_std, device=device)[:, None, None]
    readouts = nn.ModuleList(nn.Linear(config.width, 2) for _ in range(config.depth)).to(device)
    head.train()

    def losses_of_step(step: int) -> Losses:
        generator = step_generator(seed, step)
        rows = torch.randint(len(flights), (training.windows, 1), generator=generator)
        starts = torch.randint(frames_NFHW3.shape[1] - config.window + 1, (training.windows, 1), generator=generator)
        window = starts + torch.arange(config.window)
        pixels = frames_NFHW3[rows, window].to(device)
        flow = coarse_flow(pixels, grid_hw) / flow_deviation
        images = (pixels.permute(0, 1, 4, 2, 3).float() / 255 - mean) / std
        tokens = head.tokens(images.flatten(0, 1)).unflatten(0, (training.windows, config.window))
        trace: list[tuple[torch.Tensor, torch.Tensor]] = []
        predicted = head.tsformer(tokens, trace).unflatten(-1, (config.window - 1, 6))
        target = labels[rows, window[:, :-1]].to(device)
        motion = motion_loss(predicted, target, training.weights)
        read = [
            readout(patches[:, :-1]).transpose(2, 3).unflatten(-1, grid_hw)
            for readout, (patches, _) in zip(readouts, trace, strict=True)
        ]
        flow_loss = torch.stack([F.mse_loss(one, flow) for one in read]).sum()
        mse = ((predicted - target) ** 2)[..., [0, 3, 4, 5]].mean()
        return {"loss": motion + training.flow_weight * flow_loss, "motion": motion, "flow": flow_loss, "mse": mse}

    optimise("rgb_head", [*head.parameters(), *readouts.parameters()], training.optimiser, losses_of_step, curve_file)
    head.eval()
