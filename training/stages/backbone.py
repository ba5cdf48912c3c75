"""The world model on rows of one schedule, side by side: their texts as features, their visual tokens as hidden states.

Legend: B rows, V visual tokens, X text tokens, Ct text channels.
Source: spec/training.md 2.3; spec/world_model.md 2.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.attention_mask import RowLayout, lay_out
from worldvln_edge.models.quantizer import EncodedScale
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule


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


def visual_hidden(
    model: WorldModel, schedule: ScaleSchedule, scales: list[EncodedScale], text_BXt: Tensor, text_lengths: list[int]
) -> Tensor:
    """Hidden states of all visual tokens of a batch with one schedule: [B, V, width]."""
    keys = [(scale.clip, scale.scale) for scale in scales]
    ids_BS = torch.stack([scale.real_scale_id_B for scale in scales], 1).tolist()
    rows = [[RowLayout(schedule, tokens, keys, ids)] for tokens, ids in zip(text_lengths, ids_BS, strict=True)]
    layout = lay_out(rows, model.config, pad_multiple=1)
    latents = torch.cat([scale.input_BLC for scale in scales], 1)
    mask = layout.mask.to(latents.device).dense()
    return model.forward_training(latents, text_BXt[:, : layout.text], layout.rope_B2Ln.to(latents.device), mask)
