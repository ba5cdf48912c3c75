"""Policy losses of scored segments: the product's, and the published one for comparison.

Legend: B samples (a segment of a flight each), N most bits of a sample.
Source: spec/training.md 5.7 (published, `min` for both signs: 5.9 item 10), 5.9 item 7 (product).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from worldvln_edge.config import ConfigError

_LARGEST_LOG_RATIO = 60.0


class ObjectiveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which loss, and how far the policy may move."""

    kind: Literal["product", "published"] = "product"
    """product: mean over bits, k3, signed advantages. published: sum over bits, advantages in [0, 1]."""
    eps: float = 0.02
    """Ratios outside of 1 +- eps that would gain from going further have no gradient."""
    beta: float = 0.05
    """Weight of the divergence from the reference policy."""
    aux: float = 0.0
    """published only: weight of the likelihood of the flown bits, good or bad."""
    advantage_limit: float = 5.0
    """Advantages are clipped to +- this."""

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ConfigError(f"grpo.objective.eps must be in (0, 1), found {self.eps}")
        for name in ("beta", "aux"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"grpo.objective.{name} must be finite and >= 0, found {getattr(self, name)}")
        if not 0 < self.advantage_limit < float("inf"):
            raise ConfigError(f"grpo.objective.advantage_limit must be finite and > 0, found {self.advantage_limit}")
        if self.aux and self.kind == "product":
            raise ConfigError("grpo.objective.aux is of the published objective only; set it to 0")


class SampleLosses(NamedTuple):
    """Of every sample, float [B]."""

    policy: Tensor
    """Negative clipped objective; what of the loss is to be minimised beside `divergence`."""
    divergence: Tensor
    """Not weighted yet. product: k3 per bit. published: the one-sided difference per bit."""
    k3: Tensor
    """Estimate of the divergence from the reference per bit, whatever the objective."""
    ratio: Tensor
    is_clipped: Tensor
    """1 where the ratio is outside of 1 +- eps."""


def sample_losses(
    new_BN: Tensor,
    old_BN: Tensor,
    ref_BN: Tensor,
    is_bit_BN: Tensor,
    advantages_B: Tensor,
    config: ObjectiveConfig,
) -> SampleLosses:
    """Losses of samples.

    Args:
        new_BN, old_BN, ref_BN: log-probabilities of the flown bits under the trained policy (with a gradient), the one
            that flew them, and the reference.
        is_bit_BN: bool; False behind the end of a shorter sample.
        advantages_B: of the samples.
        config: which loss.
    """
    bits_B = is_bit_BN.sum(1)
    advantages_B = advantages_B.clamp(-config.advantage_limit, config.advantage_limit)

    def mean(values_BN: Tensor) -> Tensor:
        return torch.where(is_bit_BN, values_BN, 0).sum(1) / bits_B

    change_B = mean(new_BN - old_BN)
    above_BN = ref_BN - new_BN
    k3_B = mean(torch.exp(above_BN) - above_BN - 1)
    if config.kind == "published":
        change_B = (change_B * bits_B).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio_B = torch.exp(change_B)
    clipped_B = ratio_B.clamp(1 - config.eps, 1 + config.eps)
    policy_B = -torch.minimum(ratio_B * advantages_B, clipped_B * advantages_B)
    divergence_B = k3_B
    if config.kind == "published":
        divergence_B = mean(-above_BN).clamp(min=0)
        policy_B = policy_B - config.aux * mean(new_BN)
    return SampleLosses(
        policy_B, divergence_B, k3_B.detach(), ratio_B.detach(), (ratio_B != clipped_B).detach().to(ratio_B.dtype)
    )
