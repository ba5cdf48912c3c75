"""RGB head (`rgb_head`) as the trainer runs it: windows of real frames to motions.

A row is a flight that shows some windows, drawn anew in every epoch. Motion between two frames is a product of what the
patches show and of how they change. From a few numbers a frame a small head does not find it (its loss stays at that of
the mean), so the patch tokens behind every block also read out the coarse optical flow of their cell while it trains.

Legend: B windows of a batch, W frames of a window, N patch tokens of a frame = h*w, D width.
Source: spec/action_decoder.md 8; spec/training.md 4.3, 4.7, 8.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.action_windows import LabelStats, average_windows, window_starts
from worldvln_edge.config import ModelConfig
from worldvln_edge.images import rgb_head_input
from worldvln_edge.models.action_decoder import RgbActionHead
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.chunked import window_logits
from worldvln_edge.training.stages.flight_windows import draw_windows
from worldvln_edge.training.stages.motion_loss import MotionSchedule, Ramp, logged_errors, motion_terms
from worldvln_edge.training.stages.motion_validation import MotionValidation
from worldvln_edge.training.stages.optical_flow import coarse_flow
from worldvln_edge.training.stages.row_plan import RowPlan, held_out_deltas, recorded_deltas, require
from worldvln_edge.training.stages.shuffled_flights import shuffled_frames
from worldvln_edge.training.trainer.stage import MicroBatch, row_generator

_STATISTICS_ROWS = 64  # of which the deviation of the flow is taken


class RgbStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values for the small presets; the head is not trained for the released sizes."""

    step_rows: int = 32
    micro_rows: int = 32
    windows: int = 1
    """Windows drawn of a row."""
    flow: float = 1.0
    """Weight of the flow readout behind every block."""
    weights: MotionSchedule = MotionSchedule(rotation=Ramp(start=1.0, end=1.0), z=Ramp(start=1.0, end=1.0))
    windows_chunk: int = 24
    """Windows of a held-out flight that go through the head at once."""
    held_out_rows: int = 128

    def __post_init__(self) -> None:
        require(self, "rgb_head", ">= 1", lambda n: n >= 1, ("step_rows", "micro_rows", "windows"))
        require(self, "rgb_head", ">= 0", lambda n: n >= 0, ("flow", "windows_chunk", "held_out_rows"))


@dataclass(frozen=True, kw_only=True)
class RgbBatch:
    images_BW3HW: Tensor
    """float32, as the head reads them."""
    flow_BM2hw: Tensor
    """float32 [B, W-1, 2, h, w] in units of its deviation."""
    target_BM6: Tensor
    """float32 [B, W-1, 6], normalised."""


class RgbStage:
    """See `Stage`. `network` holds `head` (an RgbActionHead) and `readouts`, which are thrown away with the run.

    Args:
        head: trained in place.
        config: of the model.
        flights: training rows.
        training: hyper-parameters.
        seed: of order and windows.
        stats: label statistics; None computes them from the training flights. Kept in `stats`.
        held_out: rows of other flights.

    Raises:
        StageDataError: no flight is long enough, or one without recorded motion.
    """

    name = "rgb_head"
    best_metric = "endpoint_m"

    def __init__(
        self,
        head: RgbActionHead,
        config: ModelConfig,
        flights: FlightSource,
        training: RgbStageConfig,
        *,
        seed: int,
        stats: LabelStats | None = None,
        held_out: FlightSource | None = None,
    ):
        sizes = head.config.rgb_head
        self._head, self._config, self._flights, self._held_out = head, config, flights, held_out
        self._training, self._seed, self._window, self._grid_hw = training, seed, sizes.window, sizes.grid_hw
        device = next(head.parameters()).device
        readouts = nn.ModuleList(nn.Linear(sizes.width, 2) for _ in range(sizes.depth)) if training.flow else None
        self.network = nn.ModuleDict({"head": head})
        self._readouts = None if readouts is None else readouts.to(device)
        if self._readouts is not None:
            self.network["readouts"] = self._readouts
        self._plan = RowPlan(
            flights,
            self.name,
            shortest=self._window,
            seed=seed,
            step_rows=training.step_rows,
            micro_rows=training.micro_rows,
        )
        self._held_out_deltas = held_out_deltas(
            held_out, training.held_out_rows, shortest=self._window, stage=self.name
        )
        rows = self._plan.rows
        self.stats = stats or LabelStats.of_labels(np.concatenate([self._deltas(row) for row in rows]))
        flows = [self._flow(torch.from_numpy(flights.frames(row))[None]).flatten() for row in rows[:_STATISTICS_ROWS]]
        self._flow_deviation = float(torch.cat(flows).std()) + 1e-6
        self.epoch_started(0)

    def epoch_started(self, epoch: int) -> None:
        coefficients = self._training.weights.at(epoch) | {"flow": self._training.flow}
        self.coefficients: Mapping[str, float] = {name: weight for name, weight in coefficients.items() if weight}

    def plan(self, epoch: int) -> Sequence[Sequence[MicroBatch]]:
        return self._plan.steps(epoch)

    def row_name(self, row: int) -> str:
        return self._flights.name(row)

    def load(self, epoch: int, rows: MicroBatch) -> RgbBatch:
        images, flows, targets = [], [], []
        for row in rows:
            frames, labels = self._flights.frames(row), self.stats.normalise(self._deltas(row))
            windows = draw_windows(
                len(frames),
                self._config,
                window=self._window,
                count=self._training.windows,
                predicted_share=0.0,
                generator=row_generator(self._seed, epoch, row),
            )
            for run in windows:
                seen = frames[run.first : run.first + run.count]
                images.append(self._images(seen))
                flows.append(self._flow(torch.from_numpy(np.ascontiguousarray(seen))[None])[0] / self._flow_deviation)
                targets.append(torch.from_numpy(labels[run.first : run.first + run.count - 1]))
        return RgbBatch(
            images_BW3HW=torch.stack(images), flow_BM2hw=torch.stack(flows), target_BM6=torch.stack(targets)
        )

    def weights(self, batch: RgbBatch) -> Mapping[str, float]:
        names = ["rotation", "xy", "z", "mse", *(["flow"] if self._training.flow else [])]
        return dict.fromkeys(names, float(len(batch.target_BM6)))

    def totals(self, batch: RgbBatch) -> Mapping[str, Tensor]:
        device = next(self._head.parameters()).device
        images, target = batch.images_BW3HW.to(device), batch.target_BM6.to(device)
        tokens = self._head.tokens(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        trace: list[tuple[Tensor, Tensor]] | None = None if self._readouts is None else []
        predicted = self._head.tsformer(tokens, trace).float().unflatten(-1, (self._window - 1, 6))
        totals = {name: values.sum() for name, values in motion_terms(predicted, target).items()}
        totals["mse"] = logged_errors(predicted, target).sum()
        if self._readouts is not None and trace is not None:
            flow = batch.flow_BM2hw.to(device)
            read = [
                readout(patches[:, :-1]).transpose(2, 3).unflatten(-1, self._grid_hw)
                for readout, (patches, _) in zip(self._readouts, trace, strict=True)
            ]
            totals["flow"] = torch.stack([(one - flow).square().flatten(1).mean(1).sum() for one in read]).sum()
        return totals

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Errors over held-out flights, see `MotionValidation.metrics`."""
        if self._held_out is None:
            return {}
        report = MotionValidation(self._config, self.stats)
        for row, deltas in self._held_out_deltas.items():
            images = self._images(self._held_out.frames(row))
            report.add(
                deltas,
                self._motion(images),
                shuffled_N6=self._motion(images[shuffled_frames(row, len(images))]),
            )
        return report.metrics()

    def _motion(self, images_F3HW: Tensor) -> np.ndarray:
        """Averaged motions [F-1, 6] in rad and m."""
        tokens = self._head.tokens(images_F3HW.to(next(self._head.parameters()).device))
        starts = window_starts(len(images_F3HW), self._window)
        logits = window_logits(self._head.tsformer, tokens, starts, self._training.windows_chunk)
        deltas = self.stats.denormalise(logits.unflatten(-1, (self._window - 1, 6)).cpu().numpy())
        return average_windows(deltas, starts, len(images_F3HW))[1:]

    def _images(self, frames_FHW3: np.ndarray) -> Tensor:
        decoder = self._head.config
        return torch.from_numpy(
            rgb_head_input(list(frames_FHW3), decoder.rgb_head.image_hw, decoder.rgb_mean, decoder.rgb_std)
        )

    def _flow(self, frames_BFHW3: Tensor) -> Tensor:
        return coarse_flow(frames_BFHW3, self._grid_hw)

    def _deltas(self, row: int) -> np.ndarray:
        return recorded_deltas(self._flights, row, self.name)
