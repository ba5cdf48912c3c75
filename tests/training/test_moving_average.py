"""Averaged weights: what a block sees, and that nothing is lost by it."""

import pytest
import torch
from torch import nn

from worldvln_edge.training.trainer.ema import MovingAverage


def test_blocks_see_the_average_also_within_each_other_and_leave_the_weights_as_they_were():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    average = MovingAverage(network, 0.75)
    nn.init.constant_(network.weight, 5.0)
    average.update()

    def fail_inside() -> None:
        with average.in_place():
            with average.in_place():
                assert network.weight.item() == 2.0
            assert network.weight.item() == 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert network.weight.item() == 5.0
    torch.testing.assert_close(average.shadow["weight"], torch.full((1, 1), 2.0))
