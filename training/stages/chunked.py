"""Networks over many frames or windows with the memory of a few: exact, at the price of a second forward pass.

Frames are independent in the adapter and windows in the TimesFormer, so they may run in chunks of which only the
inputs are kept; every chunk runs again when its gradient is asked for. Gradients of tokens that several windows share
add up in the precision of the tokens, float32.

Legend: C channels, F frames, h w rows and columns, N tokens of a frame, D width, K windows.
Source: spec/training.md 3 (adapter_frames_chunk), 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.timesformer import TimesFormer


def adapter_tokens(adapter: Adapter, features_CFhw: Tensor, chunk: int) -> Tensor:
    """Patch tokens [F, N, D] of frames, `chunk` frames at a time; 0 takes all at once and keeps everything."""
    if chunk < 1 or features_CFhw.shape[1] <= chunk:
        return adapter(features_CFhw[None]).float()
    parts = [checkpoint(adapter, part[None], use_reentrant=False) for part in features_CFhw.split(chunk, 1)]
    return torch.cat(parts).float()


def window_logits(tsformer: TimesFormer, tokens_FND: Tensor, starts: Sequence[int], chunk: int) -> Tensor:
    """Logits [K, outputs] of windows that begin at frames `starts`, `chunk` windows at a time; 0 as above."""
    if chunk < 1 or len(starts) <= chunk:
        return tsformer.forward_frames(tokens_FND, starts).float()
    parts = [
        checkpoint(tsformer.forward_frames, tokens_FND, starts[first : first + chunk], use_reentrant=False)
        for first in range(0, len(starts), chunk)
    ]
    return torch.cat(parts).float()
