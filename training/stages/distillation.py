"""Distillation of patch tokens: the exact terms of the adapter's loss and their weights by epoch.

Legend: M tokens, D width.
Source: spec/training.md 3.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import torch.nn.functional as F
from torch import Tensor

TERMS = ("cos", "mean", "std", "mse")


class DistillationWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the four terms. A term of weight 0 is not computed."""

    cos: float = 1.0
    mean: float = 0.0
    std: float = 0.0
    mse: float = 0.1
    schedule: Literal["swap", "none"] = "swap"
    """`swap`: cos and mse change places between epochs 45 and 55 (1-based), linearly; `none`: fixed weights."""

    def at(self, epoch: int) -> dict[str, float]:
        """Weights of a 0-based epoch, those above 0."""
        share = 0.0 if self.schedule == "none" else min(1.0, max(0.0, (epoch + 1 - 45) / 10))
        weights = {
            "cos": self.cos + share * (self.mse - self.cos),
            "mean": self.mean,
            "std": self.std,
            "mse": self.mse + share * (self.cos - self.mse),
        }
        return {name: weight for name, weight in weights.items() if weight != 0}


def distillation_terms(student_MD: Tensor, teacher_MD: Tensor, names: tuple[str, ...] = TERMS) -> dict[str, Tensor]:
    """Terms over all tokens of one sample; `std` is left out for a single token, which has none."""
    terms = {}
    if "cos" in names:
        terms["cos"] = (1 - F.cosine_similarity(student_MD, teacher_MD, dim=-1)).mean()
    if "mean" in names:
        terms["mean"] = F.mse_loss(student_MD.mean(0), teacher_MD.mean(0))
    if "std" in names and len(student_MD) > 1:
        terms["std"] = F.mse_loss(student_MD.std(0), teacher_MD.std(0))
    if "mse" in names:
        terms["mse"] = F.mse_loss(student_MD, teacher_MD)
    return terms
