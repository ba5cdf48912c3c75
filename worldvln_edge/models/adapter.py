"""Adapter: VAE features of a frame to TimesFormer patch tokens. Frames are independent.

Legend: B batch, C feature channels, T frames, H W rows and columns, N tokens of a frame (row-major), D token width.
Source: spec/action_decoder.md 1.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import AdapterConfig, ConfigError

_SKIP_WEIGHT = 0.1


class Adapter(nn.Module):
    """Resize, convolution, patch convolution, LayerNorm.

    Args:
        config: sizes.
        in_channels: channels of the features.
        width: D.
        use_skip: add the pooled 1x1 projection of the resized features (key `skip.weight`); not in released weights.

    Raises:
        ConfigError: resize_hw does not divide by patch, or hidden by groups.
    """

    def __init__(self, config: AdapterConfig, in_channels: int, width: int, *, use_skip: bool = False):
        super().__init__()
        if config.resize_hw[0] % config.patch or config.resize_hw[1] % config.patch or config.hidden % config.groups:
            raise ConfigError(
                f"adapter: resize_hw {config.resize_hw} must divide by patch {config.patch} and hidden {config.hidden} "
                f"by groups {config.groups}"
            )
        self.config = config
        self.in_channels = in_channels
        self.conv_a = nn.Sequential(
            nn.Conv2d(in_channels, config.hidden, 3, padding=1),
            nn.GroupNorm(config.groups, config.hidden, eps=1e-5),
            nn.SiLU(),
        )
        self.patch = nn.Conv2d(config.hidden, width, config.patch, stride=config.patch)
        self.out_norm = nn.LayerNorm(width, eps=1e-5)
        self.skip = nn.Conv2d(in_channels, width, 1, bias=False) if use_skip else None

    def forward(self, features_BCTHW: Tensor) -> Tensor:
        """Tokens of every frame.

        Args:
            features_BCTHW: last up-block features, any H and W (the aspect is not kept).

        Returns:
            [B*T, N, D], batch slow, time fast.

        Raises:
            ValueError: not 5-D, or another channel count.
        """
        if features_BCTHW.ndim != 5 or features_BCTHW.shape[1] != self.in_channels:
            raise ValueError(
                f"adapter: features must be [B, {self.in_channels}, T, H, W], found {list(features_BCTHW.shape)}"
            )
        x = features_BCTHW.movedim(2, 1).flatten(0, 1)
        x = F.interpolate(x, size=self.config.resize_hw, mode="bilinear", align_corners=False, antialias=False)
        y = self.patch(self.conv_a(x))
        if self.skip is not None:
            y = y + _SKIP_WEIGHT * F.avg_pool2d(self.skip(x), self.config.patch, stride=self.config.patch)
        return self.out_norm(y.flatten(2).transpose(1, 2))
