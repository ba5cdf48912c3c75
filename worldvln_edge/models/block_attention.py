"""Attention over the visible tiles of a block mask: FlexAttention.

On CUDA it runs compiled, which is what skips the tiles that nobody sees; elsewhere PyTorch computes the same from a
dense mask, forward only.
Source: spec/training.md 2.4.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

SMALLEST_HEAD = 16
"""Narrower heads have no compiled kernel."""


def can_attend_in_blocks(device: torch.device, head_dim: int) -> bool:
    """Whether training can use block masks there: with a backward pass, and without building a dense mask."""
    return device.type == "cuda" and head_dim >= SMALLEST_HEAD


def block_attention(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: BlockMask) -> Tensor:
    """Mixed values [B, H, L, D]; H query heads share G key heads.

    Raises:
        NotImplementedError: a gradient is wanted on the CPU; use the dense mask there.
    """
    attend = _compiled() if q_BHLD.is_cuda else cast("Callable[..., Tensor]", flex_attention)
    return attend(q_BHLD, k_BGLD, v_BGLD, block_mask=mask, enable_gqa=q_BHLD.shape[1] != k_BGLD.shape[1])


@cache
def _compiled() -> Callable[..., Tensor]:
    # Sequences differ in length from step to step; one kernel for all of them.
    return torch.compile(flex_attention, dynamic=True)
