"""Windows of flights for the VAE's stages, with the motion and the coarse flow that its readouts learn.

A row is a flight; it shows one window of frames, drawn anew in every epoch. Every term is a mean over the row, so that
terms sum over rows and ranks.

Legend: B rows, F frames, T latent frames, C latent channels, h w latent grid.
Source: spec/training.md 8.3, 8.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.optical_flow import coarse_flow
from worldvln_edge.training.stages.row_plan import RowPlan, StageDataError, checked_deltas, recorded_deltas
from worldvln_edge.training.stages.vae import MotionReadouts, frames_to_video
from worldvln_edge.training.trainer.stage import MicroBatch, row_generator

_STATISTICS_ROWS = 64  # of which the deviation of the flow is taken
_STANDING = LabelStats(mean_angles=(0, 0, 0), std_angles=(0, 0, 0), mean_t=(0, 0, 0), std_t=(0, 0, 0))


class WindowTraining(Protocol):
    """What the configs of both stages have."""

    @property
    def step_rows(self) -> int: ...

    @property
    def micro_rows(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def weights(self) -> msgspec.Struct: ...


@dataclass(frozen=True, kw_only=True)
class VaeTargets:
    """Units of the readouts, from the training flights."""

    stats: LabelStats
    flow_deviation: float

    @property
    def moving(self) -> np.ndarray:
        """Columns that move, bool [6]; roll and pitch do not in the simulator."""
        return self.stats.std > 1e-4


@dataclass(frozen=True, kw_only=True)
class VaeBatch:
    frames_BFHW3: Tensor
    """uint8."""
    motion_BFc: Tensor
    """float32 [B, F-1, moving columns], in units of their deviation."""
    scales_kept: list[int]
    is_raw: list[bool]


def measure_targets(flights: FlightSource, config: ModelConfig) -> VaeTargets:
    """Label statistics of all flights with recorded motion, and the deviation of the flow of the first ones.

    Without any recorded motion no column moves, and the VAE can learn without motion terms only.

    Raises:
        StageDataError: motions that are broken.
    """
    labels = [
        checked_deltas(flights, row, deltas, "vae")
        for row in range(len(flights))
        if (deltas := flights.deltas(row)) is not None
    ]
    flows = [_flow(torch.from_numpy(flights.frames(row))[None], config) for row in _first_moving(flights)]
    deviation = float(torch.cat([flow.flatten() for flow in flows]).std()) if flows else 0.0
    stats = LabelStats.of_labels(np.concatenate(labels)) if labels else _STANDING
    return VaeTargets(stats=stats, flow_deviation=deviation + 1e-6)


def _first_moving(flights: FlightSource) -> Iterator[int]:
    return (row for row in range(min(len(flights), _STATISTICS_ROWS)) if flights.frame_count(row) > 1)


def _flow(frames_BFHW3: Tensor, config: ModelConfig) -> Tensor:
    return coarse_flow(frames_BFHW3, config.schedule.latent_hw)


class WindowStage:
    """What both stages share: windows of flights, and readouts of their motion."""

    name: str

    def __init__(
        self,
        vae: VideoVAE,
        readouts: MotionReadouts,
        config: ModelConfig,
        flights: FlightSource,
        targets: VaeTargets,
        training: WindowTraining,
        *,
        seed: int,
    ):
        stride, window = config.video_vae.temporal_stride, training.window
        if window <= stride or (window - 1) % stride:
            raise ConfigError(f"{self.name}.window must be 1 + {stride}*k frames, k >= 1, found {window}")
        if readouts.columns != int(targets.moving.sum()):
            raise ConfigError(
                f"{self.name}: readouts of {readouts.columns} columns, but {int(targets.moving.sum())} columns of the "
                "motions move; build MotionReadouts for those"
            )
        self._vae, self._readouts, self._config, self._flights = vae, readouts, config, flights
        self._targets, self._window, self._seed = targets, window, seed
        self._plan = RowPlan(
            flights,
            self.name,
            shortest=window,
            seed=seed,
            step_rows=training.step_rows,
            micro_rows=training.micro_rows,
        )
        self.network: nn.Module = nn.ModuleDict({"vae": vae, "readouts": readouts})
        weights = training.weights
        self.coefficients: Mapping[str, float] = {
            name: getattr(weights, name) for name in weights.__struct_fields__ if getattr(weights, name)
        }
        if self._reads_motion and not targets.moving.any():
            raise StageDataError(
                f"{self.name}: the flights have no recorded motion that moves; give others, or set the motion terms of "
                f"{self.name}.weights to 0"
            )

    def plan(self, epoch: int) -> Sequence[Sequence[MicroBatch]]:
        return self._plan.steps(epoch)

    def row_name(self, row: int) -> str:
        return self._flights.name(row)

    def weights(self, batch: VaeBatch) -> Mapping[str, float]:
        return dict.fromkeys(self.coefficients, float(len(batch.frames_BFHW3)))

    def load(self, epoch: int, rows: MicroBatch) -> VaeBatch:
        frames, motions, kept, is_raw = [], [], [], []
        for row in rows:
            generator = row_generator(self._seed, epoch, row)
            count = self._flights.frame_count(row)
            first = int(torch.randint(count - self._window + 1, (), generator=generator))
            frames.append(torch.from_numpy(self._flights.frames(row)[first : first + self._window]))
            motions.append(self._motion(self._flights, row)[first : first + self._window - 1])
            scales, raw = self._draw_path(generator)
            kept.append(scales)
            is_raw.append(raw)
        return VaeBatch(
            frames_BFHW3=torch.stack(frames), motion_BFc=torch.stack(motions), scales_kept=kept, is_raw=is_raw
        )

    def _draw_path(self, generator: torch.Generator) -> tuple[int, bool]:
        """How many scales of a row count, and whether its features are decoded before quantisation."""
        return self._config.schedule.scales_per_clip, False

    @property
    def _reads_motion(self) -> bool:
        return self._asks_for("motion_codes", "motion_features")

    def _motion(self, flights: FlightSource, row: int) -> Tensor:
        if not self._reads_motion:  # then rows need not have any
            return torch.zeros(flights.frame_count(row) - 1, self._readouts.columns)
        normalised = self._targets.stats.normalise(recorded_deltas(flights, row, self.name))
        return torch.from_numpy(np.ascontiguousarray(normalised[:, self._targets.moving]))

    def _inputs(self, batch: VaeBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Video [B, 3, F, H, W], motion and flow in units of their deviation, on the networks' device."""
        device = next(self._vae.parameters()).device
        frames = batch.frames_BFHW3.to(device)
        flow = _flow(frames, self._config) / self._targets.flow_deviation
        return frames_to_video(frames), batch.motion_BFc.to(device), flow

    def _readout_terms(self, name: str, read: tuple[Tensor, Tensor], motion: Tensor, flow: Tensor) -> dict[str, Tensor]:
        """Summed errors of what was read of motion and flow, as far as they are asked for."""
        pairs = {f"motion_{name}": (read[0], motion), f"flow_{name}": (read[1], flow)}
        return {key: row_errors(*pair).sum() for key, pair in pairs.items() if key in self.coefficients}

    def _asks_for(self, *names: str) -> bool:
        return any(name in self.coefficients for name in names)


def row_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of every row: [B]."""
    return (found.float() - wanted.float()).square().flatten(1).mean(1)
