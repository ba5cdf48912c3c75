"""Parameters of every network and of every graph, from the config alone, and their bytes at each precision.

Source: spec/world_model.md 2.2; spec/video_vae.md 1; spec/action_decoder.md 1, 2; T5 v1.1 encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from worldvln_edge.config import ModelConfig, TextEncoderConfig, TimesFormerConfig, WorldModelConfig
from worldvln_edge.export.vae_cost import decoder_layers, encoder_layers, norm_parameters, pixel_layers
from worldvln_edge.runtime.worldvln import graphs

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
INT4_BLOCK = 64
_WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
_SCALE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a network, or of what a graph reads of it."""

    matrices: int = 0
    """Linear weights of the world model's blocks: what int8, fp8 and int4 quantise."""
    precise: int = 0
    """Rest of the world model (heads, embeddings, norms) and T5's output projections: always fp32 (2.6)."""
    halved: int = 0
    """Text encoder, VAE and action heads: fp32 in an fp32 bundle, else 16 bits."""

    @property
    def total(self) -> int:
        return self.matrices + self.precise + self.halved

    def size_bytes(self, precision: str) -> int:
        """Bytes of the weights. int4 counts one 16-bit scale for each block of 64 weights.

        Raises:
            ValueError: unknown precision.
        """
        if precision not in _WEIGHT_BITS:
            raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
        bits = self.matrices * _WEIGHT_BITS[precision] + self.precise * 32
        bits += self.halved * (32 if precision == "fp32" else 16)
        if precision == "int4":
            bits += self.matrices // INT4_BLOCK * _SCALE_BITS
        return bits // 8


def network_parameters(config: ModelConfig) -> dict[str, ParameterCount]:
    """Parameters of the networks as the released checkpoints store them, by network."""
    model = config.world_model
    vae, hw = config.video_vae, config.image_hw
    raw = vae.raw_channels
    encoder_norms, decoder_norms = norm_parameters(vae)
    encoder = sum(layer.parameters for layer in encoder_layers(vae, hw, 1, True)[:-1]) + encoder_norms
    decoder = sum(layer.parameters for layer in decoder_layers(vae, hw, 1, True)[1:]) + decoder_norms
    decoder += sum(layer.parameters for layer in pixel_layers(vae, hw, 1, True)[1:])
    unused = 2 * (raw * raw + raw) + 3  # second projections, and three of the four scales
    unused_tokens = model.width  # sos_token
    rest = _step_extras(model) + _text_extras(model) + unused_tokens + model.depth * _block_norms(model)
    return {
        "text_encoder": _text_encoder(config.text_encoder),
        "world_model": ParameterCount(matrices=model.depth * _block_matrices(model), precise=rest),
        "video_vae": ParameterCount(halved=encoder + decoder + 2 * (raw * raw + raw) + 1 + unused),
        "action_adapter": ParameterCount(halved=_adapter(config)),
        "latent_head": ParameterCount(halved=_timesformer(config.action_decoder.latent_head)),
        "rgb_head": ParameterCount(halved=_timesformer(config.action_decoder.rgb_head)),
    }


def graph_parameters(config: ModelConfig) -> dict[str, ParameterCount]:
    """Parameters that one call of each graph reads."""
    model, vae, hw = config.world_model, config.video_vae, config.image_hw
    encoder_norms, decoder_norms = norm_parameters(vae)
    encoder = sum(layer.parameters for layer in encoder_layers(vae, hw, 1, True)) + encoder_norms
    last_norm = vae.block_out_channels[0]
    decoder = sum(layer.parameters for layer in decoder_layers(vae, hw, 1, True)) + decoder_norms - last_norm
    pixels = sum(layer.parameters for layer in pixel_layers(vae, hw, 1, True)) + last_norm
    kv = 2 * model.width * model.kv_heads * model.head_dim
    head, rgb = config.action_decoder.latent_head, config.action_decoder.rgb_head
    text = _text_encoder(config.text_encoder)
    halved = {graphs.VAE_ENCODER: encoder, graphs.VAE_DECODER: decoder, graphs.VAE_PIXELS: pixels}
    return {
        graphs.TEXT_ENCODER: ParameterCount(halved=text.halved, precise=text.precise + _text_extras(model)),
        graphs.LATENT_EMBED: ParameterCount(precise=(model.latent_channels + 1) * model.width),
        graphs.WORLD_MODEL_CONTEXT: ParameterCount(
            matrices=(model.depth - 1) * _block_matrices(model) + kv, precise=model.depth * _block_norms(model)
        ),
        graphs.WORLD_MODEL_STEP: ParameterCount(
            matrices=model.depth * _block_matrices(model),
            precise=_step_extras(model) + model.depth * _block_norms(model),
        ),
        **{
            graphs.first_or_next(stem, is_first): ParameterCount(halved=count)
            for stem, count in halved.items()
            for is_first in (True, False)
        },
        graphs.ACTION_ADAPTER: ParameterCount(halved=_adapter(config)),
        graphs.ACTION_HEAD: ParameterCount(halved=_timesformer(head) - _patch_embed(head)),
        graphs.RGB_HEAD: ParameterCount(halved=_timesformer(rgb)),
    }


def _block_matrices(model: WorldModelConfig) -> int:
    kv = 2 * model.width * model.kv_heads * model.head_dim
    return 2 * model.width**2 + kv + 3 * model.width * model.intermediate


def _block_norms(model: WorldModelConfig) -> int:
    """Norms of a block, and the biases of its attention where it has them."""
    biases = 2 * model.width + 2 * model.kv_heads * model.head_dim if model.qkvo_bias else 0
    return 2 * model.width + 2 * model.head_dim + biases


def _step_extras(model: WorldModelConfig) -> int:
    heads = 2 * (model.semantic_bits + model.detail_bits) * (model.width + 1)
    return (model.latent_channels + 1) * model.width + model.width + heads


def _text_extras(model: WorldModelConfig) -> int:
    return (model.text_channels + 1) * model.width + model.text_max_tokens * model.text_channels


def _text_encoder(text: TextEncoderConfig) -> ParameterCount:
    layer = 4 * text.width * text.heads * text.head_dim + 3 * text.width * text.feed_forward + 2 * text.width
    rest = text.layers * layer + text.relative_buckets * text.heads + text.width + text.vocabulary * text.width
    wide = text.layers * text.width * text.feed_forward  # activations behind it leave the range of float16
    return ParameterCount(halved=rest - wide, precise=wide)


def _adapter(config: ModelConfig) -> int:
    adapter, width = config.action_decoder.adapter, config.action_decoder.latent_head.width
    convolution = 9 * config.video_vae.feature_channels * adapter.hidden + adapter.hidden
    return convolution + 2 * adapter.hidden + adapter.patch**2 * adapter.hidden * width + 3 * width


def _patch_embed(head: TimesFormerConfig) -> int:
    return 3 * head.patch**2 * head.width + head.width


def _timesformer(head: TimesFormerConfig) -> int:
    d, hidden = head.width, head.mlp_ratio * head.width
    attention = 4 * d * d + 4 * d
    block = 2 * attention + (d * d + d) + 2 * d * hidden + hidden + d + 6 * d
    embeddings = d * (1 + 1 + head.tokens_per_frame + head.window)
    return embeddings + _patch_embed(head) + head.depth * block + 2 * d + (d + 1) * head.outputs
