"""A batch of the backbone: rows encoded scale by scale and laid out as sequences, on the CPU, without networks.

Legend: B sequences, V most visual tokens of a sequence, X most text tokens, L length, R rows (over all sequences),
N tokens of one head, C latent channels, d bits of a token, G groups (clip, scale).
Source: spec/training.md 2.2 (targets), 2.3 (sequence), 2.6 (weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.attention_mask import RowLayout, ScaleKey, SequenceLayout, SequenceMask, lay_out
from worldvln_edge.models.quantizer import EncodedScale, encode_for_training
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.data.captions import without_tag
from worldvln_edge.training.stages.backbone_rows import (
    BackboneDataError,
    LatentFlights,
    RowDraws,
    RowsCorruption,
)
from worldvln_edge.training.stages.bit_loss import scale_weight


@dataclass(frozen=True, kw_only=True)
class HeadTargets:
    """What one of the two heads has to say."""

    place_N: Tensor
    """int64: token of the flattened [B, V]."""
    bits_Nd: Tensor
    """bool."""
    weight_N: Tensor
    """float32: share of the token in the loss, before dividing by the sum of all."""
    row_N: Tensor
    """int64: row of the batch."""
    group_N: Tensor
    """int64: clip * scales per clip + scale."""

    def to(self, device: torch.device) -> HeadTargets:
        return HeadTargets(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class BackboneBatch:
    """Rows that go through the networks together."""

    rows: tuple[int, ...]
    latents_BVC: Tensor
    """float32, zero where a sequence has fewer tokens."""
    ids_RX: Tensor
    """int64 token ids of every row's prompt, zero behind its end."""
    text_lengths: tuple[int, ...]
    text_place_BX: Tensor
    """int64: which token of the flattened [R, X'] of prompts stands there; 0 for padding."""
    unconditional_R: Tensor
    """bool: the row is shown no text."""
    mask: SequenceMask
    rope_B2Ln: Tensor
    semantic: HeadTargets
    detail: HeadTargets

    @property
    def device(self) -> torch.device:
        return self.latents_BVC.device

    @property
    def all_tokens(self) -> int:
        """B * L."""
        return self.mask.documents_BL.numel()

    @property
    def used_tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.mask.documents_BL < self.mask.visible_BDD.shape[-1] - 1).sum())

    def to(self, device: torch.device) -> BackboneBatch:
        """The same batch on a device."""
        return replace(
            self,
            latents_BVC=self.latents_BVC.to(device),
            ids_RX=self.ids_RX.to(device),
            text_place_BX=self.text_place_BX.to(device),
            unconditional_R=self.unconditional_R.to(device),
            mask=self.mask.to(device),
            rope_B2Ln=self.rope_B2Ln.to(device),
            semantic=self.semantic.to(device),
            detail=self.detail.to(device),
        )

    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of every row."""
        return [tuple(ids[:length]) for ids, length in zip(self.ids_RX.tolist(), self.text_lengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ScaleWeights:
    """Weights of the scales in the loss (2.6)."""

    reweight: float
    limit: float
    image_clip: float

    def of(self, schedule: ScaleSchedule, key: ScaleKey) -> float:
        last = schedule.last_step(len(schedule.clips) - 1, schedule.config.scales_per_clip - 1).tokens
        weight = scale_weight(schedule.last_step(*key).tokens, last, self.reweight, self.limit)
        return weight * (self.image_clip if key[0] == 0 else 1.0)


class BatchMaker:
    """Makes batches of flights; holds no network, so that worker processes can use it.

    Args:
        config: schedule, bits, horizon.
        flights: latents and instructions.
        tokenizer: of prompts.
        weights: of scales.
        pad_multiple: sequences are padded to a multiple of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        flights: LatentFlights,
        tokenizer: PromptTokenizer,
        weights: ScaleWeights,
        *,
        pad_multiple: int,
    ):
        self.config, self.flights = config, flights
        self._tokenizer, self._weights, self._pad_multiple = tokenizer, weights, pad_multiple
        self._schedules: dict[int, ScaleSchedule] = {}

    def schedule(self, row: int) -> ScaleSchedule:
        """Full schedule of a row."""
        frames = self.flights.latent_frames(row)
        if frames not in self._schedules:
            self._schedules[frames] = ScaleSchedule(self.config.schedule, frames)
        return self._schedules[frames]

    def prompt(self, row: int, instruction: str) -> Tensor:
        """Token ids of an instruction with the duration tag of the row: int64 [X]."""
        frames = (self.flights.latent_frames(row) - 1) * self.config.video_vae.temporal_stride + 1
        text = without_tag(instruction)
        if not text:
            raise BackboneDataError(f"{self.flights.name(row)}: the instruction is empty; say what the flight does")
        return torch.from_numpy(self._tokenizer.encode(tagged_prompt(text, self.config.horizon, frames)))

    def make(self, rows: Sequence[int], draws: Sequence[RowDraws], *, is_packed: bool) -> BackboneBatch:
        """Encode and lay out rows.

        Args:
            rows: of the flights.
            draws: of every row.
            is_packed: one sequence holds all rows; else every row is a sequence.

        Raises:
            BackboneDataError: latents of another shape than announced, or not finite; an empty instruction.
        """
        encoded = self._encode(rows, draws)
        prompts = [self.prompt(row, draw.instruction) for row, draw in zip(rows, draws, strict=True)]
        layouts = [
            RowLayout(self.schedule(row), len(ids), draw.scales, [scale.real_scale_id for scale in scales])
            for row, ids, draw, scales in zip(rows, prompts, draws, encoded, strict=True)
        ]
        layout = lay_out(
            [layouts] if is_packed else [[one] for one in layouts],
            self.config.world_model,
            pad_multiple=self._pad_multiple,
        )
        sequences = layout.rope_B2Ln.shape[0]
        latents = torch.zeros(sequences, layout.visual, self.config.world_model.latent_channels)
        for (b, first), scales in zip(layout.visual_starts, encoded, strict=True):
            latents[b, first : first + sum(len(s.input_LC) for s in scales)] = torch.cat([s.input_LC for s in scales])
        return BackboneBatch(
            rows=tuple(rows),
            latents_BVC=latents,
            ids_RX=torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
            text_lengths=tuple(len(ids) for ids in prompts),
            text_place_BX=_text_places(layout, [len(ids) for ids in prompts]),
            unconditional_R=torch.tensor([draw.is_unconditional for draw in draws]),
            mask=layout.mask,
            rope_B2Ln=layout.rope_B2Ln,
            semantic=self._targets(rows, layout, encoded, is_semantic=True),
            detail=self._targets(rows, layout, encoded, is_semantic=False),
        )

    def _latents(self, row: int) -> Tensor:
        latents = self.flights.latents(row)
        channels, grid = self.config.world_model.latent_channels, self.config.schedule.latent_hw
        expected = (channels, self.flights.latent_frames(row), *grid)
        if tuple(latents.shape) != expected:
            raise BackboneDataError(
                f"{self.flights.name(row)}: latents are {list(latents.shape)}, {list(expected)} are expected; empty "
                "the latent cache"
            )
        if not torch.isfinite(latents).all():
            raise BackboneDataError(
                f"{self.flights.name(row)}: latents hold NaN or infinity; check the video and empty the latent cache"
            )
        return latents.float()

    def _encode(self, rows: Sequence[int], draws: Sequence[RowDraws]) -> list[list[_RowScale]]:
        """The chosen scales of every row; rows of one length are encoded together."""
        by_frames: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_frames.setdefault(self.flights.latent_frames(row), []).append(index)
        found: list[list[_RowScale]] = [[] for _ in rows]
        for members in by_frames.values():
            latents = torch.stack([self._latents(rows[index]) for index in members])
            corruption = RowsCorruption([draws[index].corruption for index in members])
            for clip in self.schedule(rows[members[0]]).clips:
                clip_latents = latents[:, :, clip.frame_slice]
                for scale in encode_for_training(clip_latents, clip, self.config.world_model, corruption):
                    for place, index in enumerate(members):
                        if (scale.clip, scale.scale) in draws[index].scales:
                            found[index].append(_RowScale.of(scale, place))
        return found

    def _targets(
        self, rows: Sequence[int], layout: SequenceLayout, encoded: list[list[_RowScale]], *, is_semantic: bool
    ) -> HeadTargets:
        semantic_scales, per_clip = self.config.schedule.semantic_scales, self.config.schedule.scales_per_clip
        model = self.config.world_model
        places, bits, weights, row_numbers, groups = [], [], [], [], []
        for index, scales in enumerate(encoded):
            sequence, token = layout.visual_starts[index]
            start = sequence * layout.visual + token
            for scale in scales:
                count = len(scale.bits_Ld)
                if (scale.key[1] < semantic_scales) == is_semantic:
                    share = self._weights.of(self.schedule(rows[index]), scale.key) / count
                    places.append(torch.arange(start, start + count))
                    bits.append(scale.bits_Ld)
                    weights.append(torch.full((count,), share))
                    row_numbers.append(torch.full((count,), index))
                    groups.append(torch.full((count,), scale.key[0] * per_clip + scale.key[1]))
                start += count
        if not places:
            none = torch.zeros(0, dtype=torch.int64)
            width = model.semantic_bits if is_semantic else model.detail_bits
            return HeadTargets(
                place_N=none,
                bits_Nd=torch.zeros(0, width, dtype=torch.bool),
                weight_N=torch.zeros(0),
                row_N=none,
                group_N=none,
            )
        return HeadTargets(
            place_N=torch.cat(places),
            bits_Nd=torch.cat(bits),
            weight_N=torch.cat(weights),
            row_N=torch.cat(row_numbers),
            group_N=torch.cat(groups),
        )


@dataclass(frozen=True, kw_only=True)
class _RowScale:
    key: ScaleKey
    real_scale_id: int
    input_LC: Tensor
    bits_Ld: Tensor

    @staticmethod
    def of(scale: EncodedScale, place: int) -> _RowScale:
        return _RowScale(
            key=(scale.clip, scale.scale),
            real_scale_id=int(scale.real_scale_id_B[place]),
            input_LC=scale.input_BLC[place],
            bits_Ld=scale.label_bits_BLd[place],
        )


def _text_places(layout: SequenceLayout, lengths: list[int]) -> Tensor:
    places = torch.zeros(layout.rope_B2Ln.shape[0], layout.text, dtype=torch.int64)
    longest = max(lengths)
    for row, ((b, first), length) in enumerate(zip(layout.text_starts, lengths, strict=True)):
        places[b, first : first + length] = torch.arange(length) + row * longest
    return places
