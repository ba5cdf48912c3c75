"""Convolutions of the video VAE as a list: sizes of every layer of one streaming call.

Legend: F frames of a layer in this call, h w its rows and columns.
Source: spec/video_vae.md 2, 3, 5, 8, 9. The 1x1x1 convolutions of the spatial norms run at latent resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from worldvln_edge.config import VideoVAEConfig

_MID_BLOCKS = 2
_STATE_FRAMES = 2
_CAUSAL_TAPS = 27


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution (27 taps, with a streaming state) or pointwise product (1 tap, without)."""

    inputs: int
    outputs: int
    taps: int
    frames: int
    hw: tuple[int, int]

    @property
    def positions(self) -> int:
        return self.frames * self.hw[0] * self.hw[1]

    @property
    def macs(self) -> int:
        return self.inputs * self.outputs * self.taps * self.positions

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs * self.taps + self.outputs

    @property
    def state_elements(self) -> int:
        return self.inputs * _STATE_FRAMES * self.hw[0] * self.hw[1] if self.taps == _CAUSAL_TAPS else 0


def encoder_layers(config: VideoVAEConfig, image_hw: tuple[int, int], frames: int, is_first: bool) -> list[Layer]:
    """Encoder and projection for a call of `frames` frames."""
    (h, w), layers, widths = _shrink(image_hw, config.pixel_patch), [], config.block_out_channels
    layers.append(_causal(3 * config.pixel_patch**2, widths[0], frames, (h, w)))
    for i, width in enumerate(widths[:-1]):
        layers += [_causal(width, width, frames, (h, w))] * (2 * config.layers_per_block)
        if i < len(config.spatial_factors):
            sf, tf = config.spatial_factors[i], config.temporal_factors[i]
            layers.append(_causal(width, widths[i + 1] // sf**2, frames, (h, w)))
            h, w = h // sf, w // sf
            frames = 1 + (frames - 1) // tf if is_first else frames // tf
    layers += [_causal(widths[-1], widths[-1], frames, (h, w))] * (2 * _MID_BLOCKS)
    layers.append(_causal(widths[-1], 2 * config.latent_channels, frames, (h, w)))
    layers.append(_projection(config, frames, (h, w)))
    return layers


def decoder_layers(config: VideoVAEConfig, image_hw: tuple[int, int], latents: int, is_first: bool) -> list[Layer]:
    """Projection and decoder up to the last up block for a call of `latents` latent frames."""
    widths, latent_hw = config.block_out_channels, _latent_hw(config, image_hw)
    (h, w), frames = latent_hw, latents

    def residual(width: int) -> list[Layer]:
        half = [*_spatial_norm(config, width, latents, latent_hw), _causal(width, width, frames, (h, w))]
        return half * 2

    layers = [_projection(config, latents, latent_hw), _causal(config.latent_channels, widths[-1], latents, latent_hw)]
    layers += residual(widths[-1]) * (_MID_BLOCKS + config.layers_per_block + 1)
    for i in reversed(range(len(config.spatial_factors))):
        sf, tf = config.spatial_factors[i], config.temporal_factors[i]
        layers += residual(widths[i + 1]) * (config.layers_per_block + 1)
        layers.append(_causal(widths[i + 1], tf * sf**2 * widths[i], frames, (h, w)))
        h, w = h * sf, w * sf
        frames = 1 + tf * (frames - 1) if is_first else tf * frames
    return layers


def pixel_layers(config: VideoVAEConfig, image_hw: tuple[int, int], latents: int, is_first: bool) -> list[Layer]:
    """Last norm and convolution, for the features of `latents` latent frames."""
    latent_hw, width = _latent_hw(config, image_hw), config.block_out_channels[0]
    frames = 1 + config.temporal_stride * (latents - 1) if is_first else config.temporal_stride * latents
    return [
        _projection(config, latents, latent_hw),
        *_spatial_norm(config, width, latents, latent_hw),
        _causal(width, 3 * config.pixel_patch**2, frames, _shrink(image_hw, config.pixel_patch)),
    ]


def states(layers: list[Layer]) -> list[int]:
    """Elements of every state tensor, in order."""
    return [layer.state_elements for layer in layers if layer.state_elements]


def widest_elements(layers: list[Layer]) -> int:
    """Most elements alive at once: a convolution's input with its two earlier frames, its output, and the residual."""
    widest = 0
    for layer in layers:
        area = layer.hw[0] * layer.hw[1]
        extended = layer.inputs * (layer.frames + (_STATE_FRAMES if layer.taps == _CAUSAL_TAPS else 0)) * area
        widest = max(widest, extended + (layer.inputs + layer.outputs) * layer.positions)
    return widest


def norm_parameters(config: VideoVAEConfig) -> tuple[int, int]:
    """Elements of the RMS norms (`gamma`) of encoder and decoder, the decoder's last one included."""
    widths, blocks = config.block_out_channels, config.layers_per_block
    encoder = sum(2 * blocks * width for width in widths[:-1]) + sum(widths[: len(config.spatial_factors)])
    encoder += 2 * _MID_BLOCKS * widths[-1] + widths[-1]
    decoder = 2 * (_MID_BLOCKS + blocks + 1) * widths[-1] + widths[0]
    decoder += sum((2 * (blocks + 1) + 1) * widths[i + 1] for i in range(len(config.spatial_factors)))
    return encoder, decoder


def _causal(inputs: int, outputs: int, frames: int, hw: tuple[int, int]) -> Layer:
    return Layer(inputs=inputs, outputs=outputs, taps=_CAUSAL_TAPS, frames=frames, hw=hw)


def _spatial_norm(config: VideoVAEConfig, width: int, latents: int, hw: tuple[int, int]) -> list[Layer]:
    return [Layer(inputs=config.latent_channels, outputs=width, taps=1, frames=latents, hw=hw)] * 2


def _projection(config: VideoVAEConfig, latents: int, latent_hw: tuple[int, int]) -> Layer:
    raw = config.raw_channels
    return Layer(inputs=raw, outputs=raw, taps=1, frames=latents, hw=_shrink(latent_hw, config.latent_patch))


def _latent_hw(config: VideoVAEConfig, image_hw: tuple[int, int]) -> tuple[int, int]:
    return _shrink(image_hw, config.pixel_patch * math.prod(config.spatial_factors))


def _shrink(hw: tuple[int, int], factor: int) -> tuple[int, int]:
    return hw[0] // factor, hw[1] // factor
