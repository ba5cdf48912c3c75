"""Closed formulas: multiply-adds, bytes moved and live activations of one call of every graph, from the config alone.

The formulas count what the exported graphs compute (`tests/export/test_cost_model.py` compares them with the ONNX
files, node by node), so they hold for models too large to trace here. One multiply-add is two FLOP. Norms, activations
and other elementwise work are not counted.

Legend: B guidance rows, n tokens of a call, v visible cache entries (the call's own included), C width, I intermediate
width, F frames, T latent frames of a call, h w rows and columns of a scale, L text tokens.
Source: spec/world_model.md 2, 6; spec/video_vae.md 2-5; spec/action_decoder.md 1, 2, 9, 10.
"""

from __future__ import annotations

from dataclasses import dataclass

from worldvln_edge.config import ModelConfig, TimesFormerConfig
from worldvln_edge.export.vae_cost import decoder_layers, encoder_layers, pixel_layers, states, widest_elements
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.world_model_flops import context_macs, step_macs


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """One call of one graph at given shapes."""

    graph: str
    weight_macs: int
    """Multiply-adds with weights (and with the constant resize matrices)."""
    attention_macs: int = 0
    """Multiply-adds between activations: scores and weighted sums."""
    kv_elements: int = 0
    """Keys and values read and written."""
    io_elements: int
    """Elements of the other inputs and outputs."""
    activation_elements: int
    """Elements alive at the widest point, inputs of the graph not included."""
    tokens: int = 0
    """Tokens per guidance row of a world model call: the token-steps of spec/world_model.md 9.3."""

    @property
    def macs(self) -> int:
        return self.weight_macs + self.attention_macs

    @property
    def flops(self) -> int:
        return 2 * self.macs


class CostModel:
    """Costs of the graphs of one model.

    Args:
        config: sizes.
        rows: guidance rows of the cache, 1 or 2.
        visible_at_least: entries that attention runs over however few are valid: 0 for the in-place cache, the
            capacity for graphs of plain operators that mask the rest.
    """

    def __init__(self, config: ModelConfig, rows: int, *, visible_at_least: int = 0):
        self.config = config
        self.rows = rows
        self.visible_at_least = visible_at_least

    def text_encoder(self, length: int) -> CallCost:
        text, width = self.config.text_encoder, self.config.world_model.width
        inner = text.heads * text.head_dim
        layer = 4 * text.width * inner + 3 * text.width * text.feed_forward
        return CallCost(
            graph=graphs.TEXT_ENCODER,
            weight_macs=length * (text.layers * layer + 2 * text.width * width),
            attention_macs=text.layers * 2 * length * length * inner,
            io_elements=2 * length * width,
            activation_elements=length * (2 * text.width + max(2 * text.feed_forward, 3 * inner))
            + text.heads * length * length,
        )

    def latent_embed(self, tokens: int) -> CallCost:
        model = self.config.world_model
        io = self.rows * tokens * (model.latent_channels + model.width)
        return CallCost(
            graph=graphs.LATENT_EMBED,
            weight_macs=self.rows * tokens * model.latent_channels * model.width,
            io_elements=io,
            activation_elements=self.rows * tokens * model.width,
        )

    def context(self, tokens: int, past: int) -> CallCost:
        """Keys and values of `tokens` tokens behind `past` entries; the last block stops after them (9.1 g)."""
        model = self.config.world_model
        macs = context_macs(model, rows=self.rows, tokens=tokens, visible=self._visible(tokens, past))
        return CallCost(
            graph=graphs.WORLD_MODEL_CONTEXT,
            weight_macs=macs.weights,
            attention_macs=macs.attention,
            kv_elements=self._kv(tokens, past, model.depth - 1)
            + self.rows * tokens * 2 * model.kv_heads * model.head_dim,
            io_elements=self.rows * tokens * model.width,
            activation_elements=self._block_activations(tokens),
            tokens=tokens,
        )

    def step(self, thw: tuple[int, int, int], past: int) -> CallCost:
        """One generation step of a scale behind `past` entries: resizes, blocks, both heads, sampled codes."""
        model, (rows, cols) = self.config.world_model, self.config.schedule.latent_hw
        t, h, w = thw
        tokens, channels, bits = t * h * w, model.latent_channels, model.semantic_bits + model.detail_bits
        macs = step_macs(self.config, rows=self.rows, thw=thw, visible=self._visible(tokens, past))
        return CallCost(
            graph=graphs.WORLD_MODEL_STEP,
            weight_macs=macs.weights,
            attention_macs=macs.attention,
            kv_elements=self._kv(tokens, past, model.depth),
            io_elements=2 * channels * t * rows * cols + 4 * tokens * bits,
            activation_elements=max(self._block_activations(tokens), self.rows * tokens * (2 * model.width + 4 * bits)),
            tokens=tokens,
        )

    def vae_encoder(self, is_first: bool, frames: int) -> CallCost:
        config, hw = self.config.video_vae, self.config.image_hw
        layers = encoder_layers(config, hw, frames, is_first)
        latents = 1 if is_first else frames // config.temporal_stride
        return self._vae_call(graphs.VAE_ENCODER, is_first, layers, 3 * frames * hw[0] * hw[1], self._codes(latents))

    def vae_decoder(self, is_first: bool, latents: int) -> CallCost:
        layers = decoder_layers(self.config.video_vae, self.config.image_hw, latents, is_first)
        features = self._feature_elements(self._frames(is_first, latents))
        return self._vae_call(graphs.VAE_DECODER, is_first, layers, self._codes(latents), features)

    def vae_pixels(self, is_first: bool, latents: int) -> CallCost:
        layers = pixel_layers(self.config.video_vae, self.config.image_hw, latents, is_first)
        frames = self._frames(is_first, latents)
        read = self._feature_elements(frames) + self._codes(latents)
        height, width = self.config.image_hw
        return self._vae_call(graphs.VAE_PIXELS, is_first, layers, read, 3 * frames * height * width)

    def action_adapter(self, frames: int) -> CallCost:
        head, adapter = self.config.action_decoder.latent_head, self.config.action_decoder.adapter
        channels, pixels = self.config.video_vae.feature_channels, adapter.resize_hw[0] * adapter.resize_hw[1]
        patches = head.tokens_per_frame * adapter.hidden * adapter.patch**2 * head.width
        return CallCost(
            graph=graphs.ACTION_ADAPTER,
            weight_macs=frames * (9 * channels * adapter.hidden * pixels + patches),
            io_elements=self._feature_elements(frames) + frames * head.tokens_per_frame * head.width,
            activation_elements=frames * pixels * max(2 * adapter.hidden, channels + adapter.hidden),
        )

    def action_head(self, frames: int) -> CallCost:
        head = self.config.action_decoder.latent_head
        return self._windows(graphs.ACTION_HEAD, head, frames, 0, frames * head.tokens_per_frame * head.width)

    def rgb_head(self, frames: int) -> CallCost:
        head = self.config.action_decoder.rgb_head
        patches = frames * head.tokens_per_frame * 3 * head.patch**2 * head.width
        return self._windows(graphs.RGB_HEAD, head, frames, patches, frames * 3 * head.image_hw[0] * head.image_hw[1])

    def state_elements(self, stem: str) -> int:
        """Elements of the streaming state of `vae_encoder`, `vae_decoder` or `vae_pixels`."""
        make = {
            graphs.VAE_ENCODER: encoder_layers,
            graphs.VAE_DECODER: decoder_layers,
            graphs.VAE_PIXELS: pixel_layers,
        }[stem]
        return sum(states(make(self.config.video_vae, self.config.image_hw, 1, True)))

    @property
    def kv_elements_per_entry(self) -> int:
        """Cache elements of one entry: keys and values of all layers and rows."""
        model = self.config.world_model
        return model.depth * 2 * self.rows * model.kv_heads * model.head_dim

    def _visible(self, tokens: int, past: int) -> int:
        return max(self.visible_at_least, past + tokens)

    def _kv(self, tokens: int, past: int, layers: int) -> int:
        model = self.config.world_model
        return layers * 2 * self.rows * model.kv_heads * model.head_dim * (self._visible(tokens, past) + tokens)

    def _block_activations(self, tokens: int) -> int:
        model = self.config.world_model
        kv = 2 * model.kv_heads * model.head_dim
        # Feed-forward: residual, its input, gate and up. Attention: residual, its input, queries, result, keys, values.
        return self.rows * tokens * max(2 * model.width + 2 * model.intermediate, 4 * model.width + kv)

    def _frames(self, is_first: bool, latents: int) -> int:
        stride = self.config.video_vae.temporal_stride
        return 1 + stride * (latents - 1) if is_first else stride * latents

    def _codes(self, latents: int) -> int:
        rows, cols = self.config.schedule.latent_hw
        return self.config.video_vae.raw_channels * latents * rows * cols

    def _feature_elements(self, frames: int) -> int:
        vae, (height, width) = self.config.video_vae, self.config.image_hw
        return vae.feature_channels * frames * (height // vae.pixel_patch) * (width // vae.pixel_patch)

    def _vae_call(self, stem: str, is_first: bool, layers: list, read: int, written: int) -> CallCost:
        state = sum(states(layers))
        return CallCost(
            graph=graphs.first_or_next(stem, is_first),
            weight_macs=sum(layer.macs for layer in layers),
            io_elements=read + written + (state if is_first else 2 * state),
            activation_elements=widest_elements(layers) + state,
        )

    def _windows(self, graph: str, head: TimesFormerConfig, frames: int, patch_macs: int, read: int) -> CallCost:
        windows, t, n, d = frames - head.window + 1, head.window, head.tokens_per_frame, head.width
        temporal, mlp = 5 * t * n * d * d, 2 * head.mlp_ratio * d * d
        whole = temporal + 4 * t * (1 + n) * d * d + (1 + t * n) * mlp
        last = temporal + t * (2 * (1 + n) + 2) * d * d + mlp  # only the class token is read (10.4)
        mixing = 2 * n * t * t * d
        attention = head.depth * mixing + 2 * t * d * ((head.depth - 1) * (1 + n) ** 2 + (1 + n))
        return CallCost(
            graph=graph,
            weight_macs=patch_macs + windows * ((head.depth - 1) * whole + last + d * head.outputs),
            attention_macs=windows * attention,
            io_elements=read + windows * head.outputs,
            activation_elements=windows * t * (1 + n) * d * max(2 + head.mlp_ratio, 5),
        )
