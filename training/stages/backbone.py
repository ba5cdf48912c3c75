"""Backbone supervised finetuning (`sft`): the text encoder and the world model learn the bits of real flights.

Legend: B rows, V visual tokens, X text tokens, C latent channels, d bits of a token.
Source: spec/training.md 2 (targets, sequence, attention, loss); spec/world_model.md 2.7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.attention_mask import all_scales, training_mask, training_rope
from worldvln_edge.models.quantizer import EncodedScale, SelfCorrection, encode_for_training
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.loop import Losses, OptimiserConfig, optimise, step_generator


@dataclass(frozen=True, kw_only=True)
class BackboneTrainingConfig:
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=1e-3, steps=1000, weight_decay=0.02, clip_norm=5.0)
    )
    batch: int = 16
    flip_strength: float = 0.1
    condition_drop: float = 0.1
    scale_reweight: float = 0.5  # k of spec/training.md 2.6; small k lifts the coarse scales, which carry the motion
    scale_weight_limit: float = 40.0
    image_clip_weight: float = 0.2  # the image clip is always observed, never generated in flight


class TextBatch:
    """Token ids of a set of instructions, padded once."""

    def __init__(self, instructions: tuple[str, ...], tokenizer: PromptTokenizer, config: ModelConfig):
        ids = [torch.from_numpy(tokenizer.encode(tagged_prompt(text, config.horizon))) for text in instructions]
        self.lengths = torch.tensor([len(row) for row in ids])
        self._ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)

    def features(self, encoder: TextEncoder, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Features [B, X, Ct] of some rows, on the encoder's device, and the length of each."""
        device = next(encoder.parameters()).device
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return encoder(self._ids[rows, :longest].to(device), mask.long().to(device)), lengths.tolist()


def drop_conditions(features_BXt: Tensor, cfg_uncond: Tensor, dropped_B: Tensor) -> Tensor:
    """Replace the text of some rows by the unconditional rows; the input is left as it is."""
    uncond = cfg_uncond[: features_BXt.shape[1]].expand_as(features_BXt)
    return torch.where(dropped_B[:, None, None], uncond, features_BXt)


def visual_hidden(
    model: WorldModel, schedule: ScaleSchedule, scales: list[EncodedScale], text_BXt: Tensor, text_lengths: list[int]
) -> Tensor:
    """Hidden states of all visual tokens of a batch with one schedule: [B, V, width]."""
    keys = [(scale.clip, scale.scale) for scale in scales]
    latents = torch.cat([scale.input_BLC for scale in scales], 1)
    length = latents.shape[1] + text_BXt.shape[1]
    ids_BS = torch.stack([scale.real_scale_id_B for scale in scales], 1)
    ropes: dict[tuple[int, ...], Tensor] = {}
    for row in ids_BS.tolist():
        key = tuple(row)
        if key not in ropes:
            ropes[key] = training_rope(schedule, row, text_BXt.shape[1], length, model.config, keys)
    rope = next(iter(ropes.values())) if len(ropes) == 1 else torch.stack([ropes[tuple(r)] for r in ids_BS.tolist()])
    mask = training_mask(schedule, text_lengths, length, keys)
    return model.forward_training(latents, text_BXt, rope.to(latents.device), mask.to(latents.device))


def scale_weight(tokens: int, last_tokens: int, reweight: float, limit: float) -> float:
    """Weight of a scale's mean loss (spec/training.md 2.6): n * min(limit, (n_last/n)^(1/(1+k))); k=0 gives n."""
    if reweight == 0:
        return float(tokens)
    return tokens * min(limit, (last_tokens / tokens) ** (1 / (1 + reweight)))


def train_backbone(
    text_encoder: TextEncoder,
    model: WorldModel,
    config: ModelConfig,
    latents_NCTHW: Tensor,
    text: TextBatch,
    training: BackboneTrainingConfig,
    curve_file: Path,
    *,
    seed: int,
) -> None:
    """Train text encoder and world model in place, on their device, on cached latents.

    Args:
        text_encoder, model: both on one device.
        config: schedule and bits.
        latents_NCTHW: float32 raw VAE features of whole flights, on the CPU; batches move to the device.
        text: instructions of the same flights.
        training: hyper-parameters.
        curve_file: JSON-lines file that the loss curve is appended to.
        seed: of all draws.

    Raises:
        TrainingDivergedError: losses that are not finite.
    """
    schedule = ScaleSchedule(config.schedule, latents_NCTHW.shape[2])
    last_tokens = schedule.last_step(len(schedule.clips) - 1, config.schedule.scales_per_clip - 1).tokens
    keys = all_scales(schedule)
    device = next(model.parameters()).device
    text_encoder.train()
    model.train()

    def losses_of_step(step: int) -> Losses:
        generator = step_generator(seed, step)
        rows = torch.randint(len(latents_NCTHW), (training.batch,), generator=generator)
        latents = latents_NCTHW[rows].to(device)
        corruption = SelfCorrection(schedule, training.flip_strength, generator)
        scales = [
            scale
            for clip in schedule.clips
            for scale in encode_for_training(latents[:, :, clip.frame_slice], clip, config.world_model, corruption)
        ]
        features, lengths = text.features(text_encoder, rows)
        dropped = (torch.rand(training.batch, generator=generator) < training.condition_drop).to(device)
        hidden = visual_hidden(model, schedule, scales, drop_conditions(features, model.cfg_uncond, dropped), lengths)
        total, weights, start = hidden.new_zeros(()), 0.0, 0
        measured: dict[str, list[Tensor]] = {}
        for (clip, index), scale in zip(keys, scales, strict=True):
            end = start + scale.input_BLC.shape[1]
            semantic = index < config.schedule.semantic_scales
            loss = bit_loss(model.logits(hidden[:, start:end], semantic), scale.label_bits_BLd)
            weight = scale_weight(end - start, last_tokens, training.scale_reweight, training.scale_weight_limit)
            weight *= training.image_clip_weight if clip == 0 else 1.0
            total, weights, start = total + weight * loss, weights + weight, end
            if clip > 0:
                measured.setdefault(f"bit_ce_scale{index}", []).append(loss.detach())
        means = {name: torch.stack(values).mean() for name, values in measured.items()}
        return {"loss": total / weights, **means}

    optimise("sft", [*text_encoder.parameters(), *model.parameters()], training.optimiser, losses_of_step, curve_file)
    text_encoder.eval()
    model.eval()


def bit_loss(logits_BLd2: Tensor, bits_BLd: Tensor) -> Tensor:
    """Mean two-way cross entropy of bits; logits [..., 2], index 1 = bit set."""
    return F.binary_cross_entropy_with_logits(logits_BLd2[..., 1] - logits_BLd2[..., 0], bits_BLd.float())
