"""Causal video VAE: frames to raw features and summed codes to frames, whole or in a stream.

Legend: B batch, T frames, L latent frames (1 + (T-1)/temporal_stride for a whole sequence), H W pixels,
h pre-patchify latent with 2*latent_channels channels (mean, log-variance), z raw features, codes summed codes.
State: a tuple of tensors [B, C, 2, h, w], one per 3x3x3 convolution, in running order:
  encoder: conv_in; per down block its residual blocks' conv1, conv2, then its sampler; mid block; conv_out.
  decoder: conv_in; mid block; per up block its residual blocks' conv1, conv2, then its sampler; and last, only when
  pixels are decoded, conv_out.
A state is never modified, so what comes next may be tried from a committed state without touching it.
Source: spec/video_vae.md 1-5, 8.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ConfigError, VideoVAEConfig
from worldvln_edge.models.vae_layers import (
    STATE_FRAMES,
    CausalConv3d,
    ChannelRMSNorm,
    ConvStream,
    DecoderResidualBlock,
    DownSampler,
    ResidualBlock,
    SpatialNorm,
    UpSampler,
    patchify,
    unpatchify,
)

State = tuple[Tensor, ...]
_MID_BLOCKS = 2


class MidBlock(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(blocks)


class DownBlock(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], sampler: DownSampler | None):
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.downsamplers = nn.ModuleList([sampler] if sampler is not None else [])

    def forward(self, x_BCTHW: Tensor, stream: ConvStream) -> Tensor:
        for module in [*self.resnets, *self.downsamplers]:
            x_BCTHW = module(x_BCTHW, stream)
        return x_BCTHW


class UpBlock(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], sampler: UpSampler | None):
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.upsamplers = nn.ModuleList([sampler] if sampler is not None else [])
        self.time_factor = 1 if sampler is None else sampler.tf

    def forward(self, x_BCTHW: Tensor, zq_BCTHW: Tensor, stream: ConvStream, last_frames: int | None) -> Tensor:
        """At least the newest `last_frames` frames are computed; None computes all."""
        for resnet in self.resnets:
            x_BCTHW = resnet(x_BCTHW, zq_BCTHW, stream)
        needed = None if last_frames is None else -(-last_frames // self.time_factor)
        for sampler in self.upsamplers:
            x_BCTHW = sampler(x_BCTHW, stream, needed)
        return x_BCTHW


class VAEEncoder(nn.Module):
    """Patchified frames to mean and log-variance (spec/video_vae.md 3)."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        samplers = [
            DownSampler(widths[i], widths[i + 1], sf, tf)
            for i, (sf, tf) in enumerate(zip(config.spatial_factors, config.temporal_factors, strict=True))
        ]
        self.conv_in = CausalConv3d(3 * config.pixel_patch**2, widths[0])
        self.down_blocks = nn.ModuleList(
            DownBlock([ResidualBlock(width) for _ in range(layers)], sampler)
            for width, sampler in zip(widths[:-1], [*samplers, None], strict=True)
        )
        self.mid_block = MidBlock([ResidualBlock(widths[-1]) for _ in range(_MID_BLOCKS)])
        self.norm_out = ChannelRMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x_BCTHW: Tensor, stream: ConvStream) -> Tensor:
        x = self.conv_in(x_BCTHW, stream)
        for block in [*self.down_blocks, *self.mid_block.resnets]:
            x = block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class VAEDecoder(nn.Module):
    """Latents to the last up-block feature, and from there to patchified frames (spec/video_vae.md 5)."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        widths, latent = config.block_out_channels, config.latent_channels
        time_factor = space_factor = 1

        def residual(width: int) -> DecoderResidualBlock:
            return DecoderResidualBlock(width, latent, time_factor, space_factor)

        self.conv_in = CausalConv3d(latent, widths[-1])
        self.mid_block = MidBlock([residual(widths[-1]) for _ in range(_MID_BLOCKS)])
        layers = config.layers_per_block + 1
        self.up_blocks = nn.ModuleList([UpBlock([residual(widths[-1]) for _ in range(layers)], None)])
        for i in reversed(range(len(config.spatial_factors))):
            sf, tf = config.spatial_factors[i], config.temporal_factors[i]
            blocks = [residual(widths[i + 1]) for _ in range(layers)]
            self.up_blocks.append(UpBlock(blocks, UpSampler(widths[i + 1], widths[i], sf, tf)))
            time_factor, space_factor = time_factor * tf, space_factor * sf
        self.norm_out = SpatialNorm(widths[0], latent, time_factor, space_factor)
        self.conv_out = CausalConv3d(widths[0], 3 * config.pixel_patch**2)

    def features(self, zq_BCTHW: Tensor, stream: ConvStream, last_frames: int | None = None) -> Tensor:
        x = self.conv_in(zq_BCTHW, stream)
        for resnet in self.mid_block.resnets:
            x = resnet(x, zq_BCTHW, stream)
        last = len(self.up_blocks) - 1
        for i, block in enumerate(self.up_blocks):
            x = block(x, zq_BCTHW, stream, last_frames if i == last else None)
        return x

    def pixels(self, feature_BCTHW: Tensor, zq_BCTHW: Tensor, stream: ConvStream) -> Tensor:
        x = F.silu(self.norm_out(feature_BCTHW, zq_BCTHW, stream.is_first))
        return self.conv_out(x, stream)


class VideoVAE(nn.Module):
    """The video VAE with the released state-dict keys, for any `VideoVAEConfig`.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        if config.block_out_channels[-1] != config.block_out_channels[-2]:
            raise ConfigError(
                "video_vae: the last down block has no sampler, so the last two block_out_channels must be equal; "
                f"found {config.block_out_channels}"
            )
        for name in ("layers_per_block", "latent_channels", "pixel_patch", "latent_patch"):
            if getattr(config, name) < 1:
                raise ConfigError(f"video_vae.{name} must be >= 1, found {getattr(config, name)}")
        self.config = config
        self.encoder = VAEEncoder(config)
        self.decoder = VAEDecoder(config)
        raw = config.raw_channels
        self.proj_down = nn.Linear(raw, raw)
        self.proj_up = nn.Linear(raw, raw)
        # Part of the released layout and never used: frozen, so that no optimiser carries them.
        self.proj_down_two = nn.Linear(raw, raw).requires_grad_(False)
        self.proj_up_two = nn.Linear(raw, raw).requires_grad_(False)
        self.scale_learnable_parameters = nn.Parameter(torch.ones(4))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the convolutions and of the streaming state. The projections and the latents stay float32."""
        return self.decoder.conv_in.conv.weight.dtype

    def encode(self, frames_B3THW: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, State]:
        """Encode the next frames of a sequence.

        Args:
            frames_B3THW: float in [-1, 1]. The first call takes T = 1 + k * temporal_stride frames, k >= 0; a later one
                T = k * temporal_stride, k >= 1.
            state: None for the first call, else what the previous call returned.

        Returns:
            h [B, 2*latent_channels, L, H/s, W/s] with s = spatial_stride / latent_patch; L new latent frames only.
            The next state, `encoder_state_shapes`.

        Raises:
            ValueError: wrong rank, channels, size, number of frames or state.
        """
        stride, unit = self.config.spatial_stride, self.config.temporal_stride
        if frames_B3THW.ndim != 5 or frames_B3THW.shape[1] != 3:
            raise ValueError(f"frames must be [B, 3, T, H, W], found {list(frames_B3THW.shape)}")
        frames, height, width = frames_B3THW.shape[2:]
        if height % stride or width % stride or not height or not width:
            raise ValueError(f"frame size {height}x{width} must be a positive multiple of {stride} on both sides")
        if state is None and (frames < 1 or (frames - 1) % unit):
            raise ValueError(
                f"the first call needs 1 + {unit}*k frames (1, {1 + unit}, {1 + 2 * unit}, ...), found {frames}"
            )
        if state is not None and (frames < 1 or frames % unit):
            raise ValueError(f"a later call needs {unit}*k frames ({unit}, {2 * unit}, ...), found {frames}")
        stream = ConvStream(state, encoder_convolutions(self.config))
        h = self.encoder(patchify(frames_B3THW.to(self.compute_dtype), self.config.pixel_patch), stream)
        return h.to(self.proj_down.weight.dtype), stream.state

    def moments(self, h_BCLHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation after patchify, before the projection: two [B, raw_channels, L, h/p, w/p]."""
        mean, logvar = patchify(h_BCLHW, self.config.latent_patch).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def raw_features(self, h_BCLHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the world model quantises: [B, raw_channels, L, H/stride, W/stride] (spec/video_vae.md 4).

        Args:
            h_BCLHW: from `encode`.
            noise: standard normal numbers in the shape of the result for a sample; None takes the mean.
        """
        if noise is None:
            z = patchify(h_BCLHW, self.config.latent_patch)[:, : self.config.raw_channels]
        else:
            mean, std = self.moments(h_BCLHW)
            z = mean + std * noise
        z = self.proj_down(z.movedim(1, -1)).movedim(-1, 1)
        return z * self.scale_learnable_parameters[0]

    def decode_features(
        self, codes_BCLHW: Tensor, state: Sequence[Tensor] | None = None, *, last_frames: int | None = None
    ) -> tuple[Tensor, State]:
        """The last up-block feature, which feeds the action decoder.

        Args:
            codes_BCLHW: summed codes [B, raw_channels, L, H/stride, W/stride] of the next L >= 1 latent frames.
            state: None for the first call, else what the previous call returned.
            last_frames: compute only that many frames of the feature, the newest; the state covers all of them.

        Returns:
            [B, feature_channels, T, H/pixel_patch, W/pixel_patch]; T = 1 + temporal_stride*(L-1) at the start of a
            sequence, else temporal_stride*L. The next state, `decoder_state_shapes(..., pixels=False)`.

        Raises:
            ValueError: wrong rank, channels, number of frames or state.
        """
        stream = ConvStream(state, decoder_convolutions(self.config))
        zq = self._unproject(codes_BCLHW)
        frames = self._frames_of(codes_BCLHW, stream.is_first)
        if last_frames is not None and not 1 <= last_frames <= frames:
            raise ValueError(f"last_frames must be 1..{frames} (the frames of this call), found {last_frames}")
        feature = self.decoder.features(zq, stream, last_frames)
        return (feature if last_frames is None else feature[:, :, -last_frames:]), stream.state

    def decode_pixels(
        self, feature_BCTHW: Tensor, codes_BCLHW: Tensor, state: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Frames from the last up-block feature of the same codes.

        Returns:
            [B, 3, T, H, W], not clamped. The next state: one tensor, the last of `decoder_state_shapes`.

        Raises:
            ValueError: feature and codes are not of the same frames, or a wrong state.
        """
        stream = ConvStream(state, 1)
        frames = self._frames_of(codes_BCLHW, stream.is_first)
        if feature_BCTHW.ndim != 5 or feature_BCTHW.shape[2] != frames:
            raise ValueError(
                f"{codes_BCLHW.shape[2]} latent frames belong to {frames} feature frames here, found a feature of "
                f"shape {list(feature_BCTHW.shape)}; pass the whole feature of these codes, and a state after the first"
            )
        x = self.decoder.pixels(feature_BCTHW, self._unproject(codes_BCLHW), stream)
        return unpatchify(x.to(codes_BCLHW.dtype), self.config.pixel_patch), stream.state

    def decode(self, codes_BCLHW: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, State]:
        """Frames from summed codes: `decode_features`, then `decode_pixels`.

        Returns:
            [B, 3, T, H, W], not clamped. The next state, `decoder_state_shapes(..., pixels=True)`.
        """
        cut = decoder_convolutions(self.config)
        feature_state, pixel_state = (None, None) if state is None else (state[:cut], state[cut:])
        feature, feature_state = self.decode_features(codes_BCLHW, feature_state)
        pixels, pixel_state = self.decode_pixels(feature, codes_BCLHW, pixel_state)
        return pixels, feature_state + pixel_state

    def _unproject(self, codes_BCLHW: Tensor) -> Tensor:
        if codes_BCLHW.ndim != 5 or codes_BCLHW.shape[1] != self.config.raw_channels or codes_BCLHW.shape[2] < 1:
            raise ValueError(
                f"codes must be [B, {self.config.raw_channels}, L >= 1, h, w], found {list(codes_BCLHW.shape)}"
            )
        z = codes_BCLHW / self.scale_learnable_parameters[0]
        zq = unpatchify(self.proj_up(z.movedim(1, -1)).movedim(-1, 1), self.config.latent_patch)
        return zq.to(self.compute_dtype)

    def _frames_of(self, codes_BCLHW: Tensor, is_first: bool) -> int:
        unit, latents = self.config.temporal_stride, codes_BCLHW.shape[2]
        return 1 + unit * (latents - 1) if is_first else unit * latents


def encoder_state_shapes(
    config: VideoVAEConfig, batch: int, image_hw: tuple[int, int]
) -> list[tuple[int, int, int, int, int]]:
    """Shapes of the encoder's state tensors, in order, for frames of `image_hw` pixels."""
    h, w = (side // config.pixel_patch for side in image_hw)
    channels_hw = [(3 * config.pixel_patch**2, h, w)]
    for i, width in enumerate(config.block_out_channels[:-1]):
        channels_hw += [(width, h, w)] * (2 * config.layers_per_block)
        if i < len(config.spatial_factors):
            channels_hw.append((width, h, w))
            h, w = h // config.spatial_factors[i], w // config.spatial_factors[i]
    channels_hw += [(config.block_out_channels[-1], h, w)] * (2 * _MID_BLOCKS + 1)
    return [(batch, c, STATE_FRAMES, h, w) for c, h, w in channels_hw]


def decoder_state_shapes(
    config: VideoVAEConfig, batch: int, image_hw: tuple[int, int], *, pixels: bool
) -> list[tuple[int, int, int, int, int]]:
    """Shapes of the decoder's state tensors, in order; `pixels` adds the one of the last convolution."""
    reduction = config.pixel_patch * math.prod(config.spatial_factors)
    h, w = (side // reduction for side in image_hw)
    widths, per_block = config.block_out_channels, 2 * (config.layers_per_block + 1)
    channels_hw = [(config.latent_channels, h, w)] + [(widths[-1], h, w)] * (2 * _MID_BLOCKS + per_block)
    for i in reversed(range(len(config.spatial_factors))):
        channels_hw += [(widths[i + 1], h, w)] * (per_block + 1)
        h, w = h * config.spatial_factors[i], w * config.spatial_factors[i]
    if pixels:
        channels_hw.append((widths[0], h, w))
    return [(batch, c, STATE_FRAMES, h, w) for c, h, w in channels_hw]


def encoder_convolutions(config: VideoVAEConfig) -> int:
    """Number of the encoder's state tensors (25 in the released model)."""
    samplers = len(config.spatial_factors)
    return 2 + samplers + 2 * config.layers_per_block * (samplers + 1) + 2 * _MID_BLOCKS


def decoder_convolutions(config: VideoVAEConfig) -> int:
    """Number of the decoder's state tensors up to the last up block (32 in the released model)."""
    samplers = len(config.spatial_factors)
    return 1 + samplers + 2 * (config.layers_per_block + 1) * (samplers + 1) + 2 * _MID_BLOCKS
