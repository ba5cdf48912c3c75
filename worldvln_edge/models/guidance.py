"""Guidance: how the conditional and the unconditional row become one.

Legend: B samples; the remaining axes of a tensor are one vector per sample.
Source: spec/world_model.md 6 (APG, plain CFG).
"""

import torch
from torch import Tensor

from worldvln_edge.models.precision import without_autocast


def adaptive_projected_guidance(
    conditional: Tensor, unconditional: Tensor, weight: float, norm_threshold: float = 0.05, eta: float = 0.0
) -> Tensor:
    """Push away from the unconditional logits, but only across the conditional ones, and only so far.

    Norms and the projection run over all tokens and channels of a sample jointly; the projection is fp64.

    Args:
        conditional: float32 [B, ...] logits, already divided by the temperature.
        unconditional: the same shape.
        weight: guidance weight; 1 returns `conditional`.
        norm_threshold: largest root mean square of the difference; 0 or less means no limit.
        eta: share of the part along `conditional` that is kept.

    Returns:
        float32 [B, ...].
    """
    with without_autocast(conditional):
        shape = conditional.shape
        c, u = conditional.float().flatten(1), unconditional.float().flatten(1)
        difference = c - u
        if norm_threshold > 0:
            rms = difference.norm(dim=1, keepdim=True) / difference.shape[1] ** 0.5
            # rms = 0 divides to infinity, and the minimum leaves the (zero) difference alone.
            difference = difference * torch.clamp(norm_threshold / rms, max=1.0)
        c64, d64 = c.double(), difference.double()
        direction = c64 / c64.norm(dim=1, keepdim=True).clamp_min(1e-12)
        parallel = (d64 * direction).sum(1, keepdim=True) * direction
        update = (d64 - parallel).float()
        if eta:
            update = update + eta * parallel.float()
        return (c + (weight - 1.0) * update).reshape(shape)


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Plain guidance: weight * conditional + (1 - weight) * unconditional, same shapes."""
    return weight * conditional + (1.0 - weight) * unconditional
