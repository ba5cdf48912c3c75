"""T5 encoder: `transformers`' own, sized by the preset.

Legend: B prompts, L tokens, Ct text channels.
Source: spec/world_model.md 4.2 (flan-t5-xl encoder in the released model), spec/training.md 8.2 (small presets).
"""

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from worldvln_edge.config import TextEncoderConfig


class TextEncoder(nn.Module):
    """Token ids to features. Keys below `t5.` are those of `T5EncoderModel`, so flan-t5 files load unchanged."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=config.vocabulary,
                d_model=config.width,
                d_kv=config.head_dim,
                d_ff=config.feed_forward,
                num_layers=config.layers,
                num_heads=config.heads,
                relative_attention_num_buckets=config.relative_buckets,
                relative_attention_max_distance=config.relative_max_distance,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                attn_implementation="eager",
            )
        )

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Features of the last hidden layer: float32 [B, L, Ct].

        Args:
            ids_BL: int64 token ids.
            mask_BL: 1 for tokens, 0 for padding; None when nothing is padded.
        """
        if mask_BL is None:
            mask_BL = torch.ones_like(ids_BL)
        return self.t5(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
