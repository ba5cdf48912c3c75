"""Action head graphs: adapter once per frame, TimesFormer on all windows at once.

Source: spec/action_decoder.md 1, 2, 4, 8, 10.
"""

import torch
from torch import Tensor, nn

from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.timesformer import TimesFormer


def _all_windows(tokens_FND: Tensor, window: int) -> Tensor:
    """Windows of stride 1: [F - window + 1, window, N, D]."""
    count = tokens_FND.shape[0] - window + 1
    return torch.stack([tokens_FND[i : i + count] for i in range(window)], 1)


class AdapterGraph(nn.Module):
    """features [1, Cf, F, h, w] -> tokens [F, N, D]."""

    def __init__(self, head: LatentActionHead):
        super().__init__()
        self.adapter = head.adapter

    def forward(self, features: Tensor) -> Tensor:
        return self.adapter(features)


class WindowsGraph(nn.Module):
    """tokens [F, N, D] -> logits [F - window + 1, outputs]."""

    def __init__(self, tsformer: TimesFormer):
        super().__init__()
        self.tsformer = tsformer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tsformer(_all_windows(tokens, self.tsformer.config.window))


class RgbGraph(nn.Module):
    """images [F, 3, h, w], normalised -> logits [F - window + 1, outputs]."""

    def __init__(self, head: RgbActionHead):
        super().__init__()
        self.tsformer = head.tsformer

    def forward(self, images: Tensor) -> Tensor:
        return self.tsformer(_all_windows(self.tsformer.patch_tokens(images), self.tsformer.config.window))
