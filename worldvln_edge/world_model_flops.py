"""Multiply-adds of the world model's calls, from the configuration alone. One multiply-add is two FLOP.

What the exported graphs have to compute is counted (`tests/export/test_cost_model.py` compares with the ONNX files):
products with weights and resize matrices, and attention over the visible entries. Norms, softmax, activations and
other elementwise work are not counted.

Legend: n tokens of a call, v visible cache entries (the call's own included), C width, D latent channels.
Source: spec/world_model.md 2, 6, 9.1 (g).
"""

from __future__ import annotations

from dataclasses import dataclass

from worldvln_edge.config import ModelConfig, WorldModelConfig


@dataclass(frozen=True, kw_only=True)
class MultiplyAdds:
    weights: int
    """With weights and with the constant resize matrices."""
    attention: int
    """Between activations: scores and weighted sums."""

    @property
    def flops(self) -> int:
        return 2 * (self.weights + self.attention)


def block_matrices(model: WorldModelConfig) -> int:
    """Elements of one block's matrices: multiply-adds of one token."""
    attention = 2 * model.width**2 + 2 * model.width * model.kv_heads * model.head_dim
    return attention + 3 * model.width * model.intermediate


def context_macs(model: WorldModelConfig, *, rows: int, tokens: int, visible: int) -> MultiplyAdds:
    """Keys and values of `tokens` tokens; the last block stops after them.

    Args:
        model: sizes.
        rows: guidance rows of the call, 1 or 2.
        tokens: n.
        visible: v.
    """
    last = 2 * model.width * model.kv_heads * model.head_dim
    deep = model.depth - 1
    return MultiplyAdds(
        weights=rows * tokens * (deep * block_matrices(model) + last),
        attention=_attention(model, rows, tokens, visible, deep),
    )


def step_macs(config: ModelConfig, *, rows: int, thw: tuple[int, int, int], visible: int) -> MultiplyAdds:
    """One generation step of a scale: resizes, blocks, both heads.

    Args:
        config: sizes.
        rows: guidance rows of the call, 1 or 2.
        thw: latent frames, rows and columns of the scale; n is their product.
        visible: v.
    """
    model, (rows_out, cols_out) = config.world_model, config.schedule.latent_hw
    (t, h, w), channels, bits = thw, model.latent_channels, model.semantic_bits + model.detail_bits
    tokens = t * h * w
    down, up = h * cols_out * (rows_out + w), rows_out * w * (h + cols_out)
    weights = channels * t * (down + up) + tokens * channels * (model.width + bits)
    weights += rows * tokens * (model.depth * block_matrices(model) + 2 * bits * model.width)
    return MultiplyAdds(weights=weights, attention=_attention(model, rows, tokens, visible, model.depth))


@dataclass(frozen=True, kw_only=True)
class SequenceTokens:
    """Tokens of a training batch, padding left out."""

    semantic: int
    """Visual tokens of semantic scales."""
    detail: int
    """Visual tokens of detail scales."""
    text: int
    pairs: int
    """(query, key) pairs that see each other."""


def sequence_macs(model: WorldModelConfig, tokens: SequenceTokens) -> MultiplyAdds:
    """One forward pass over whole sequences: embeddings, blocks, heads (spec/training.md 2.3, 2.6)."""
    visual = tokens.semantic + tokens.detail
    embeddings = model.width * (visual * model.latent_channels + tokens.text * model.text_channels)
    blocks = model.depth * (visual + tokens.text) * block_matrices(model)
    heads = 2 * model.width * (tokens.semantic * model.semantic_bits + tokens.detail * model.detail_bits)
    return MultiplyAdds(
        weights=embeddings + blocks + heads, attention=_attention(model, 1, 1, tokens.pairs, model.depth)
    )


def training_flops(
    model: WorldModelConfig, tokens: SequenceTokens, *, frozen_blocks: int = 0, has_frozen_weights: bool = False
) -> int:
    """FLOP of forward and backward, without what checkpointing computes again and without the text encoder.

    A product with weights costs as much again for the gradient of its input and once more for that of its weights.

    Args:
        model: sizes.
        tokens: of the batch.
        frozen_blocks: first blocks that have no backward pass, embeddings with them.
        has_frozen_weights: gradients pass through, but the weights get none (adapters, which are not counted).
    """
    forward = sequence_macs(model, tokens)
    total = (2 if has_frozen_weights else 3) * forward.weights + 3 * forward.attention
    if frozen_blocks:
        visual = tokens.semantic + tokens.detail
        embeddings = model.width * (visual * model.latent_channels + tokens.text * model.text_channels)
        blocks = frozen_blocks * (visual + tokens.text) * block_matrices(model)
        total -= 2 * (embeddings + blocks + _attention(model, 1, 1, tokens.pairs, frozen_blocks))
    return 2 * total


def _attention(model: WorldModelConfig, rows: int, tokens: int, visible: int, layers: int) -> int:
    return layers * 2 * rows * tokens * visible * model.width
