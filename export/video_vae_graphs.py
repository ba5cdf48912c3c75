"""Streaming VAE graphs. A sequence's first call and its later calls are two graphs with the same weights.

Source: spec/video_vae.md 8.
"""

from torch import Tensor, nn

from worldvln_edge.models.video_vae import VideoVAE


class EncoderGraph(nn.Module):
    """frames [1, 3, F, h, w] (and states) -> latents [1, D, T, H, W], next states."""

    def __init__(self, vae: VideoVAE, is_first: bool):
        super().__init__()
        self.vae, self.is_first = vae, is_first

    def forward(self, frames: Tensor, *states: Tensor):
        h, state = self.vae.encode(frames, None if self.is_first else states)
        return (self.vae.raw_features(h), *state)


class DecoderGraph(nn.Module):
    """codes [1, D, T, H, W] (and states) -> features [1, Cf, F, h, w], next states."""

    def __init__(self, vae: VideoVAE, is_first: bool):
        super().__init__()
        self.vae, self.is_first = vae, is_first

    def forward(self, codes: Tensor, *states: Tensor):
        features, state = self.vae.decode_features(codes, None if self.is_first else states)
        return (features, *state)


class PixelsGraph(nn.Module):
    """features, codes (and one state) -> pixels [1, 3, F, h, w], next state."""

    def __init__(self, vae: VideoVAE, is_first: bool):
        super().__init__()
        self.vae, self.is_first = vae, is_first

    def forward(self, features: Tensor, codes: Tensor, *states: Tensor):
        pixels, state = self.vae.decode_pixels(features, codes, None if self.is_first else states)
        return (pixels, *state)
