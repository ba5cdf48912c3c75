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


def _attention(model: WorldModelConfig, rows: int, tokens: int, visible: int, layers: int) -> int:
    return layers * 2 * rows * tokens * visible * model.width
