"""Averaged weights: an exponential moving average of the parameters, updated on optimiser steps only.

Source: spec/training.md 2.7 (EMA row).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class MovingAverage:
    """Shadow weights of the parameters of a network, sharded as these are.

    Args:
        network: its floating-point parameters are averaged, frozen ones too (they stay equal to what they are).
        decay: share of the old average that a step keeps, in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float):
        self._decay = decay
        self._parameters = dict(network.named_parameters())
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._is_in_place = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters by 1 - decay."""
        for name, parameter in self._parameters.items():
            _local(self.shadow[name]).lerp_(_local(parameter), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the network for the length of the block; inside of such a block, they stay there."""
        if self._is_in_place:
            yield
            return
        self._exchange()
        self._is_in_place = True
        try:
            yield
        finally:
            self._exchange()
            self._is_in_place = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            kept = _local(parameter).clone()
            _local(parameter).copy_(_local(self.shadow[name]))
            _local(self.shadow[name]).copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
