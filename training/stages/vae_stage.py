"""Video VAE (`vae`) as the trainer runs it: the encoder with readouts alone, then the whole.

A term of weight 0 is not computed: action-aware terms can be left out one at a time.

Legend: B rows, F frames, T latent frames, C latent channels, h w latent grid.
Source: spec/training.md 8.3, 8.6; spec/video_vae.md; `vae.py` (readouts, straight-through codes).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.row_plan import held_out_deltas, held_out_rows, require
from worldvln_edge.training.stages.vae import (
    LATENT_POWER,
    MotionReadouts,
    frames_to_video,
    quantise_straight_through,
)
from worldvln_edge.training.stages.vae_windows import VaeBatch, VaeTargets, WindowStage, row_errors


class VaeEncoderWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the warm start."""

    flow_codes: float = 1.0
    """Coarse optical flow read from the features before quantisation."""
    motion_codes: float = 0.2
    spread: float = 1.0
    """Keeps the mean square of every row's latents where the binary codes can follow."""


class VaeEncoderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Warm start of the encoder on short windows: motion takes longest to learn, and costs a third without decoder."""

    step_rows: int = 32
    micro_rows: int = 32
    window: int = 5
    """Frames."""
    weights: VaeEncoderWeights = VaeEncoderWeights()

    def __post_init__(self) -> None:
        require(self, "vae_encoder", ">= 1", lambda n: n >= 1, ("step_rows", "micro_rows"))
        _require_weights(self.weights, "vae_encoder")


class VaeWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the whole VAE."""

    reconstruction: float = 1.0
    commitment: float = 0.25
    """Of the features to their codes."""
    flow_codes: float = 0.2
    flow_features: float = 0.2
    motion_codes: float = 0.2
    motion_features: float = 0.2


class VaeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Training of encoder and decoder together."""

    step_rows: int = 6
    micro_rows: int = 6
    window: int = 17
    """Frames."""
    raw_share: float = 0.15
    """Of the rows: decode the features before quantisation instead of the summed codes. 0: codes only; 1: raw only."""
    scale_drop: float = 0.35
    """Of the rows: keep only the first scales of every clip, at least one."""
    weights: VaeWeights = VaeWeights()
    held_out_rows: int = 64

    def __post_init__(self) -> None:
        require(self, "vae", ">= 1", lambda n: n >= 1, ("step_rows", "micro_rows"))
        require(self, "vae", ">= 0", lambda n: n >= 0, ("held_out_rows",))
        require(self, "vae", "from 0 to 1", lambda n: 0 <= n <= 1, ("raw_share", "scale_drop"))
        _require_weights(self.weights, "vae")


def _require_weights(weights: msgspec.Struct, stage: str) -> None:
    require(weights, f"{stage}.weights", ">= 0", lambda n: n >= 0, weights.__struct_fields__)
    if not any(getattr(weights, name) for name in weights.__struct_fields__):
        raise ConfigError(f"{stage}.weights are all 0: nothing would be trained")


class VaeEncoderStage(WindowStage):
    """Warm start of encoder and readouts; see `Stage`. The decoder is frozen as long as this stage is used.

    Args:
        vae, readouts: trained in place.
        config: of the model.
        flights: training rows.
        targets: from `measure_targets`.
        training: hyper-parameters.
        seed: of order and windows.

    Raises:
        ConfigError: a window that does not end with a latent frame, or readouts of another number of columns.
        StageDataError: no flight is long enough, or none has motion and a term asks for it.
    """

    name = "vae_encoder"

    def __init__(
        self,
        vae: VideoVAE,
        readouts: MotionReadouts,
        config: ModelConfig,
        flights: FlightSource,
        targets: VaeTargets,
        training: VaeEncoderConfig,
        *,
        seed: int,
    ):
        super().__init__(vae, readouts, config, flights, targets, training, seed=seed)
        self.epoch_started(0)

    def epoch_started(self, epoch: int) -> None:
        self.network.requires_grad_(False)
        trained = (self._vae.encoder, self._vae.proj_down, self._readouts.codes_motion, self._readouts.codes_flow)
        for module in trained:
            module.requires_grad_(True)

    def totals(self, batch: VaeBatch) -> Mapping[str, Tensor]:
        video, motion, flow = self._inputs(batch)
        raw = self._vae.raw_features(self._vae.encode(video)[0]).float()
        totals = self._readout_terms("codes", self._readouts.from_codes(raw), motion, flow)
        if "spread" in self.coefficients:
            totals["spread"] = (raw.square().mean((1, 2, 3, 4)) - LATENT_POWER).square().sum()
        return totals

    def validate(self) -> Mapping[str, float]:
        """Nothing: what the warm start is good for shows in the whole VAE."""
        return {}


class VaeStage(WindowStage):
    """Encoder, decoder and readouts together; see `Stage`.

    Beside what is minimised it logs `reconstruction_raw` and `reconstruction_codes`, the two kinds of rows apart.

    Args and errors as `VaeEncoderStage`; `held_out` are rows of other flights.
    """

    name = "vae"

    def __init__(
        self,
        vae: VideoVAE,
        readouts: MotionReadouts,
        config: ModelConfig,
        flights: FlightSource,
        targets: VaeTargets,
        training: VaeConfig,
        *,
        seed: int,
        held_out: FlightSource | None = None,
    ):
        super().__init__(vae, readouts, config, flights, targets, training, seed=seed)
        self._training, self._held_out = training, held_out
        rows, shortest = training.held_out_rows, training.window
        self._held_out_rows = held_out_rows(held_out, rows, shortest=shortest, stage=self.name)
        if self._reads_motion and self._held_out_rows:  # what is wrong with it is said before the first step
            held_out_deltas(held_out, rows, shortest=shortest, stage=self.name)
        self.epoch_started(0)

    def epoch_started(self, epoch: int) -> None:
        self.network.requires_grad_(True)
        for unused in (self._vae.proj_down_two, self._vae.proj_up_two):
            unused.requires_grad_(False)

    def weights(self, batch: VaeBatch) -> Mapping[str, float]:
        weights = dict(super().weights(batch))
        if "reconstruction" in weights:
            raw = sum(batch.is_raw)
            parts = {"reconstruction_raw": raw, "reconstruction_codes": len(batch.is_raw) - raw}
            weights |= {name: float(rows) for name, rows in parts.items() if rows}
        return weights

    def totals(self, batch: VaeBatch) -> Mapping[str, Tensor]:
        video, motion, flow = self._inputs(batch)
        raw = self._vae.raw_features(self._vae.encode(video)[0]).float()
        schedule = ScaleSchedule(self._config.schedule, raw.shape[2])
        codes, full = quantise_straight_through(raw, schedule, self._config, batch.scales_kept)
        totals: dict[str, Tensor] = {}
        if "commitment" in self.coefficients:
            totals["commitment"] = row_errors(raw, full).sum()
        if self._asks_for("flow_codes", "motion_codes"):
            totals |= self._readout_terms("codes", self._readouts.from_codes(codes), motion, flow)
        if not self._asks_for("reconstruction", "flow_features", "motion_features"):
            return totals
        is_raw = torch.tensor(batch.is_raw, device=raw.device)
        decoded = torch.where(is_raw[:, None, None, None, None], raw, codes)
        features, _ = self._vae.decode_features(decoded)
        if "reconstruction" in self.coefficients:
            errors = row_errors(self._vae.decode_pixels(features, decoded)[0], video)
            totals["reconstruction"] = errors.sum()
            for name, rows in (("reconstruction_raw", is_raw), ("reconstruction_codes", ~is_raw)):
                if rows.any():
                    totals[name] = errors.detach()[rows].sum()
        if self._asks_for("flow_features", "motion_features"):
            totals |= self._readout_terms("features", self._readouts.from_features(features), motion, flow)
        return totals

    def _draw_path(self, generator: torch.Generator) -> tuple[int, bool]:
        dropped, raw = torch.rand(2, generator=generator).tolist()
        fewer = int(torch.randint(1, max(2, self._config.schedule.scales_per_clip), (), generator=generator))
        scales = fewer if dropped < self._training.scale_drop else self._config.schedule.scales_per_clip
        return scales, raw < self._training.raw_share

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Over held-out windows from each flight's first frame, all scales, through the codes.

        Returns:
            `reconstruction`, `commitment`, `unexplained` (reconstruction error over the pixels' variance about the mean
            image; 1 is no better than that image), and `motion_*` and `flow_*`, mean squared errors in units of the
            training variance (1 is no better than the training mean).
        """
        if self._held_out is None or not self._held_out_rows:
            return {}
        sums: dict[str, float] = {}
        pixels, squares = torch.zeros(()), 0.0
        for row in self._held_out_rows:
            frames = torch.from_numpy(self._held_out.frames(row)[: self._window])[None]
            motion = self._motion(self._held_out, row)[None, : self._window - 1]
            scales = [self._config.schedule.scales_per_clip]
            batch = VaeBatch(frames_BFHW3=frames, motion_BFc=motion, scales_kept=scales, is_raw=[False])
            for name, total in self.totals(batch).items():
                if name in self.coefficients:
                    sums[name] = sums.get(name, 0.0) + float(total)
            video = frames_to_video(frames)[0].double()
            pixels = pixels + video.mean(1)
            squares += float(video.square().mean())
        count = len(self._held_out_rows)
        metrics = {name: total / count for name, total in sums.items()}
        variance = squares / count - float((pixels / count).square().mean())
        if "reconstruction" in metrics and variance > 0:
            metrics["unexplained"] = metrics["reconstruction"] / variance
        return metrics
