"""Adapter distillation (`adapter`): decoder features learn to look like the patch embedding of real frames.

The teacher is the patch embedding of the RGB head alone, without position embedding and blocks. Decoder features come
from `DecoderFeatures`; the adapter sees the frames in small chunks that are computed again for the gradient.

Legend: F frames, N tokens of a frame, D width, Cf feature channels, h w feature rows and columns, T latent frames.
Source: spec/training.md 3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldvln_edge.config import ActionDecoderConfig, ConfigError
from worldvln_edge.images import rgb_head_input
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.timesformer import PatchEmbed
from worldvln_edge.training.stages.chunked import adapter_tokens
from worldvln_edge.training.stages.decoder_features import DecodedFlight, DecoderFeatures
from worldvln_edge.training.stages.distillation import DistillationWeights, distillation_terms
from worldvln_edge.training.stages.row_plan import RowPlan, held_out_rows, require
from worldvln_edge.training.trainer.stage import MicroBatch, row_generator


class AdapterStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults are the published values."""

    step_rows: int = 32
    micro_rows: int = 1
    weights: DistillationWeights = DistillationWeights()
    frames_chunk: int = 2
    """Frames that the adapter keeps in memory at once; 0: all."""
    latent_window: int = 0
    """Latent frames of a random window; 0: whole flights. A window is decoded without what came before it, so its
    features differ from those in flight."""
    held_out_rows: int = 64

    def __post_init__(self) -> None:
        require(self, "adapter", ">= 1", lambda n: n >= 1, ("step_rows", "micro_rows"))
        require(self, "adapter", ">= 0", lambda n: n >= 0, ("frames_chunk", "latent_window", "held_out_rows"))


@dataclass(frozen=True, kw_only=True)
class AdapterBatch:
    flights: list[DecodedFlight]
    """Kept features, or codes (of the window)."""
    images: list[Tensor]
    """float32 [F, 3, *image_hw] each: what the teacher reads, normalised."""


class AdapterStage:
    """See `Stage`. `network` is the adapter.

    Args:
        adapter: trained in place.
        teacher: patch embedding of an RGB head, e.g. `head.tsformer.patch_embed`; a frozen copy is kept.
        decoder: sizes and normalisation of both.
        features: true latents of the training flights.
        training: hyper-parameters.
        temporal_stride: frames of a latent frame.
        seed: of order and windows.
        held_out: the same of other flights.

    Raises:
        ConfigError: teacher and adapter differ in tokens or width, or windows without codes.
        StageDataError: no flight is long enough.
    """

    name = "adapter"

    def __init__(
        self,
        adapter: Adapter,
        teacher: PatchEmbed,
        decoder: ActionDecoderConfig,
        features: DecoderFeatures,
        training: AdapterStageConfig,
        *,
        temporal_stride: int,
        seed: int,
        held_out: DecoderFeatures | None = None,
    ):
        student, rgb = decoder.latent_head, decoder.rgb_head
        if (student.grid_hw, student.width) != (rgb.grid_hw, rgb.width):
            raise ConfigError(
                f"adapter: tokens of grid {student.grid_hw} and width {student.width} cannot learn from a patch "
                f"embedding of grid {rgb.grid_hw} and width {rgb.width}; both heads must agree, or train without it"
            )
        if training.latent_window and features.keep != "codes":
            raise ConfigError("adapter.latent_window decodes on its own: keep codes, not features, or set it to 0")
        self.network = adapter
        self._teacher = copy.deepcopy(teacher).requires_grad_(False)
        self._decoder, self._features, self._held_out, self._training = decoder, features, held_out, training
        self._stride, self._seed = temporal_stride, seed
        shortest = 1 + temporal_stride * max(0, training.latent_window - 1)
        self._plan = RowPlan(
            features.flights,
            self.name,
            shortest=shortest,
            seed=seed,
            step_rows=training.step_rows,
            micro_rows=training.micro_rows,
        )
        self._held_out_rows = held_out_rows(
            held_out.flights if held_out else None, training.held_out_rows, shortest=1, stage=self.name
        )
        self.epoch_started(0)

    def epoch_started(self, epoch: int) -> None:
        self.coefficients: Mapping[str, float] = self._training.weights.at(epoch)

    def plan(self, epoch: int) -> Sequence[Sequence[MicroBatch]]:
        return self._plan.steps(epoch)

    def row_name(self, row: int) -> str:
        return self._features.flights.name(row)

    def load(self, epoch: int, rows: MicroBatch) -> AdapterBatch:
        flights, images = [], []
        for row in rows:
            flight, frames = self._features.load(row), self._features.flights.frames(row)
            if self._training.latent_window:
                latents = self._training.latent_window
                generator = row_generator(self._seed, epoch, row)
                start = int(torch.randint(flight.true.shape[1] - latents + 1, (), generator=generator))
                flight = DecodedFlight(true=flight.true[:, start : start + latents], predicted=None)
                first = max(0, self._stride * (start - 1) + 1)
                frames = frames[first : first + 1 + self._stride * (latents - 1)]
            flights.append(flight)
            images.append(self._teacher_input(frames))
        return AdapterBatch(flights=flights, images=images)

    def weights(self, batch: AdapterBatch) -> Mapping[str, float]:
        return dict.fromkeys(self.coefficients, float(len(batch.flights)))

    def totals(self, batch: AdapterBatch) -> Mapping[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for flight, images in zip(batch.flights, batch.images, strict=True):
            student, teacher = self._tokens(flight, images)
            terms = distillation_terms(student.flatten(0, 1), teacher.flatten(0, 1), tuple(self.coefficients))
            totals |= {name: totals[name] + term if name in totals else term for name, term in terms.items()}
        return totals

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """`cosine` to the teacher over held-out frames: mean, 10th percentile and worst of the frames' means; `mse`."""
        if self._held_out is None or not self._held_out_rows:
            return {}
        cosines, squared = [], []
        for row in self._held_out_rows:
            images = self._teacher_input(self._held_out.flights.frames(row))
            student, teacher = self._tokens(self._held_out.load(row), images)
            cosines.append(F.cosine_similarity(student, teacher, dim=-1).mean(1).cpu())
            squared.append(float(F.mse_loss(student, teacher)))
        frames = torch.cat(cosines).double().numpy()
        return {
            "cosine": float(frames.mean()),
            "cosine_p10": float(np.percentile(frames, 10)),
            "cosine_worst": float(frames.min()),
            "mse": float(np.mean(squared)),
        }

    def _teacher_input(self, frames_FHW3: np.ndarray) -> Tensor:
        image_hw, mean, std = self._decoder.rgb_head.image_hw, self._decoder.rgb_mean, self._decoder.rgb_std
        return torch.from_numpy(rgb_head_input(list(frames_FHW3), image_hw, mean, std))

    def _tokens(self, flight: DecodedFlight, images_F3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Student and teacher tokens [F, N, D] of a flight, over the frames that both have."""
        with torch.no_grad():
            features = self._features.decode(flight).true
            frames = min(features.shape[1], len(images_F3HW))
            teacher = self._teacher(images_F3HW[:frames].to(features.device))
        student = adapter_tokens(self.network, features[:, :frames], self._training.frames_chunk)
        return student, teacher.float()
