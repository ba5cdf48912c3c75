"""Loss of bits: two-way cross entropy of every token, and what a scale counts for.

Legend: N tokens (any leading axes), d bits of a token.
Source: spec/training.md 2.6.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits_Nd2: Tensor, bits_Nd: Tensor) -> Tensor:
    """Mean over a token's bits of the two-way cross entropy [N], in the logits' dtype.

    Args:
        logits_Nd2: index 1 of the last axis means bit set.
        bits_Nd: bool labels.
    """
    difference = logits_Nd2[..., 1] - logits_Nd2[..., 0]
    return F.binary_cross_entropy_with_logits(difference, bits_Nd.to(difference.dtype), reduction="none").mean(-1)


def token_accuracies(logits_Nd2: Tensor, bits_Nd: Tensor) -> Tensor:
    """Share of a token's bits that the larger logit names [N]; equal logits say 0."""
    return ((logits_Nd2[..., 1] > logits_Nd2[..., 0]) == bits_Nd).to(logits_Nd2.dtype).mean(-1)


def scale_weight(tokens: int, last_tokens: int, reweight: float, limit: float) -> float:
    """Weight of a scale's mean loss: n * min(limit, (n_last/n)^(1/(1+k))); k=0 gives n.

    Args:
        tokens: n of the scale.
        last_tokens: n_last, tokens of the last scale of the row's full schedule.
        reweight: k.
        limit: most that a token counts for.
    """
    if reweight == 0:
        return float(tokens)
    return tokens * min(limit, (last_tokens / tokens) ** (1 / (1 + reweight)))
