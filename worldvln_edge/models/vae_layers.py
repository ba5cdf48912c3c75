"""Layers of the causal video VAE, with their streaming state kept outside of the modules.

Every 3x3x3 convolution looks two frames back. A `ConvStream` hands it the last two input frames of the previous call
and collects the last two of this call, in the order in which the convolutions run.

Legend: B batch, C channels, T frames of this call, H W rows and columns, tf sf temporal and spatial sampling factor.
Source: spec/video_vae.md 2, 8.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ConfigError

STATE_FRAMES = 2
"""Input frames that a 3x3x3 causal convolution keeps between calls."""


class ConvStream:
    """One pass over the causal convolutions of an encoder or decoder.

    Args:
        state: tensors [B, C, 2, H, W] in running order, or None for the first call of a sequence. Never modified.
        expected: how many convolutions will run.

    Raises:
        ValueError: the state holds another number of tensors.
    """

    def __init__(self, state: Sequence[Tensor] | None, expected: int):
        if state is not None and len(state) != expected:
            raise ValueError(
                f"streaming state holds {len(state)} tensors, {expected} are expected; pass the state that the "
                "previous call of the same method returned, or None for the first call"
            )
        self.is_first = state is None
        self._past = iter(state) if state is not None else None
        self._left: list[Tensor] = []

    def extend(self, x_BCTHW: Tensor) -> Tensor:
        """Put the two earlier frames in front (the first frame twice at the start of a sequence)."""
        past = x_BCTHW[:, :, :1].expand(-1, -1, STATE_FRAMES, -1, -1) if self._past is None else next(self._past)
        extended = torch.cat([past, x_BCTHW], dim=2)
        tail = extended[:, :, -STATE_FRAMES:]
        # A slice would keep the whole activation alive between calls. Under autograd it stays alive anyway.
        self._left.append(tail if torch.is_grad_enabled() else tail.clone())
        return extended

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors for the next call."""
        return tuple(self._left)


class CausalConv3d(nn.Module):
    """3x3x3 convolution: causal in time, zero-padded in space, as many frames out as in."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x_BCTHW: Tensor, stream: ConvStream, last_frames: int | None = None) -> Tensor:
        """`last_frames` computes only that many output frames; the state is the same."""
        extended = stream.extend(x_BCTHW)
        if last_frames is not None:
            extended = extended[:, :, -(last_frames + STATE_FRAMES) :]
        return self.conv(extended)


class PointConv3d(nn.Module):
    """1x1x1 convolution; no state."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def reset(self, bias: float) -> None:
        """Make the result `bias` everywhere."""
        nn.init.zeros_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.constant_(self.conv.bias, bias)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(x_BCTHW)


class ChannelRMSNorm(nn.Module):
    """x / max(||x||, 1e-12) * sqrt(C) * gamma, over the channels of each position."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.scale = math.sqrt(channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        # Squares of half-precision activations overflow and 1e-12 is zero there: the norm is taken in float32.
        is_half = x_BCTHW.dtype in (torch.float16, torch.bfloat16)
        x = x_BCTHW.float() if is_half else x_BCTHW
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return (x / norm * self.scale * self.gamma).to(x_BCTHW.dtype)


class SpatialNorm(nn.Module):
    """RMS norm whose scale and shift come from the latent: RMS(f) * Y(zq) + Bz(zq).

    The 1x1x1 convolutions run at latent resolution and their result is repeated, which equals convolving the upsampled
    latent. `time_factor` and `space_factor` say how much finer the features are than the latent.
    """

    def __init__(self, channels: int, latent_channels: int, time_factor: int, space_factor: int):
        super().__init__()
        self.norm_layer = ChannelRMSNorm(channels)
        self.conv_y = PointConv3d(latent_channels, channels)
        self.conv_b = PointConv3d(latent_channels, channels)
        self.time_factor = time_factor
        self.space_factor = space_factor
        # Training starts from a plain RMS norm.
        for point, bias in ((self.conv_y, 1.0), (self.conv_b, 0.0)):
            point.reset(bias)

    def forward(self, f_BCTHW: Tensor, zq_BCTHW: Tensor, is_first: bool) -> Tensor:
        scale, shift = (
            repeat_latent(conv(zq_BCTHW), self.time_factor, self.space_factor, is_first)
            for conv in (self.conv_y, self.conv_b)
        )
        return self.norm_layer(f_BCTHW) * scale + shift


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), channels in = channels out."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelRMSNorm(channels)
        self.conv1 = CausalConv3d(channels, channels)
        self.norm2 = ChannelRMSNorm(channels)
        self.conv2 = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, stream: ConvStream) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x_BCTHW)), stream)
        return x_BCTHW + self.conv2(F.silu(self.norm2(y)), stream)


class DecoderResidualBlock(nn.Module):
    """Residual block with spatial norms."""

    def __init__(self, channels: int, latent_channels: int, time_factor: int, space_factor: int):
        super().__init__()
        self.norm1 = SpatialNorm(channels, latent_channels, time_factor, space_factor)
        self.conv1 = CausalConv3d(channels, channels)
        self.norm2 = SpatialNorm(channels, latent_channels, time_factor, space_factor)
        self.conv2 = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, zq_BCTHW: Tensor, stream: ConvStream) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x_BCTHW, zq_BCTHW, stream.is_first)), stream)
        return x_BCTHW + self.conv2(F.silu(self.norm2(y, zq_BCTHW, stream.is_first)), stream)


class NormConv(nn.Module):
    """conv(silu(norm(x))): the learnt half of a sampler."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = ChannelRMSNorm(in_channels)
        self.conv = CausalConv3d(in_channels, out_channels)

    def forward(self, x_BCTHW: Tensor, stream: ConvStream, last_frames: int | None = None) -> Tensor:
        return self.conv(F.silu(self.norm(x_BCTHW)), stream, last_frames)


class DownSampler(nn.Module):
    """Space-to-depth of a convolution, plus the channel-averaged space-to-depth of the input."""

    def __init__(self, in_channels: int, out_channels: int, sf: int, tf: int):
        super().__init__()
        check_factors("down", sf, tf)
        if out_channels % (sf * sf) or (sf * sf * in_channels) % out_channels:
            raise ConfigError(
                f"video_vae: a down sampler {in_channels} -> {out_channels} with spatial factor {sf} does not divide; "
                f"{out_channels} must divide by {sf * sf} and {sf * sf * in_channels} by {out_channels}"
            )
        self.conv = NormConv(in_channels, out_channels // (sf * sf))
        self.out_channels, self.sf, self.tf = out_channels, sf, tf

    def forward(self, x_BCTHW: Tensor, stream: ConvStream) -> Tensor:
        main = space_to_depth(self.conv(x_BCTHW, stream), self.sf, self.tf, stream.is_first)
        short = space_to_depth(x_BCTHW, self.sf, self.tf, stream.is_first)
        b, c, t, h, w = short.shape
        return main + short.reshape(b, c // self.out_channels, self.out_channels, t, h, w).mean(1)


class UpSampler(nn.Module):
    """Depth-to-space of a convolution plus the tiled input."""

    def __init__(self, in_channels: int, out_channels: int, sf: int, tf: int):
        super().__init__()
        check_factors("up", sf, tf)
        wide = tf * sf * sf * out_channels
        if wide % in_channels:
            raise ConfigError(
                f"video_vae: an up sampler {in_channels} -> {out_channels} with factors {tf}x{sf}x{sf} does not "
                f"divide; {wide} must divide by {in_channels}"
            )
        self.conv = NormConv(in_channels, wide)
        self.tiles, self.sf, self.tf = wide // in_channels, sf, tf

    def forward(self, x_BCTHW: Tensor, stream: ConvStream, last_frames: int | None = None) -> Tensor:
        """`last_frames` input frames are sampled up (all by default); the state covers all of them."""
        is_first = stream.is_first
        if last_frames is not None and last_frames < x_BCTHW.shape[2]:
            is_first = False  # the cut takes the first frame away
        else:
            last_frames = None
        main = self.conv(x_BCTHW, stream, last_frames)
        short = x_BCTHW if last_frames is None else x_BCTHW[:, :, -last_frames:]
        # D2S is linear: one rearrangement of the sum instead of two.
        return depth_to_space(main + short.repeat(1, self.tiles, 1, 1, 1), self.sf, self.tf, is_first)


def check_factors(direction: str, sf: int, tf: int) -> None:
    """Raise ConfigError unless both sampling factors are 1 or 2."""
    if sf not in (1, 2) or tf not in (1, 2):
        raise ConfigError(
            f"video_vae: {direction} sampler factors must be 1 or 2, found spatial {sf} and temporal {tf}"
        )


def space_to_depth(x_BCTHW: Tensor, sf: int, tf: int, is_first: bool) -> Tensor:
    """Channel order (ph pw c); groups of `tf` frames are averaged, except the first frame of a sequence."""
    b, c, t, h, w = x_BCTHW.shape
    x = x_BCTHW
    if sf > 1:
        x = x.reshape(b, c, t, h // sf, sf, w // sf, sf).permute(0, 4, 6, 1, 2, 3, 5)
        x = x.reshape(b, sf * sf * c, t, h // sf, w // sf)
    if tf == 1 or (is_first and t == 1):
        return x
    first, rest = (x[:, :, :1], x[:, :, 1:]) if is_first else (None, x)
    rest = rest.reshape(b, x.shape[1], rest.shape[2] // tf, tf, x.shape[3], x.shape[4]).mean(3)
    return rest if first is None else torch.cat([first, rest], dim=2)


def depth_to_space(x_BCTHW: Tensor, sf: int, tf: int, is_first: bool) -> Tensor:
    """Channel order (pt ph pw c); at the start of a sequence the first `tf` frames become their mean."""
    b, c, t, h, w = x_BCTHW.shape
    if sf == 1 and tf == 1:
        return x_BCTHW
    c //= tf * sf * sf
    x = x_BCTHW.reshape(b, tf, sf, sf, c, t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
    x = x.reshape(b, c, t * tf, h * sf, w * sf)
    if tf == 1 or not is_first:
        return x
    first = x[:, :, :tf].mean(2, keepdim=True)
    return first if t == 1 else torch.cat([first, x[:, :, tf:]], dim=2)


def repeat_latent(y_BCTHW: Tensor, time_factor: int, space_factor: int, is_first: bool) -> Tensor:
    """Nearest upsampling; the first latent of a sequence stands for one frame, every other for `time_factor`."""
    y = y_BCTHW
    if time_factor > 1 and not (is_first and y.shape[2] == 1):
        first, rest = (y[:, :, :1], y[:, :, 1:]) if is_first else (None, y)
        b, c, t, h, w = rest.shape
        rest = rest.unsqueeze(3).expand(b, c, t, time_factor, h, w).reshape(b, c, t * time_factor, h, w)
        y = rest if first is None else torch.cat([first, rest], dim=2)
    if space_factor > 1:
        b, c, t, h, w = y.shape
        y = y.reshape(b, c * t, h, 1, w, 1).expand(b, c * t, h, space_factor, w, space_factor)
        y = y.reshape(b, c, t, h * space_factor, w * space_factor)
    return y


def patchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Pixel-unshuffle per frame: channel c*patch^2 + i*patch + j = x[c, patch*y + i, patch*x + j]."""
    if patch == 1:
        return x_BCTHW
    b, c, t, h, w = x_BCTHW.shape
    x = x_BCTHW.reshape(b, c, t, h // patch, patch, w // patch, patch).permute(0, 1, 4, 6, 2, 3, 5)
    return x.reshape(b, c * patch * patch, t, h // patch, w // patch)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Inverse of `patchify`."""
    if patch == 1:
        return x_BCTHW
    b, c, t, h, w = x_BCTHW.shape
    c //= patch * patch
    x = x_BCTHW.reshape(b, c, patch, patch, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    return x.reshape(b, c, t, h * patch, w * patch)
