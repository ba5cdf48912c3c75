"""Random draws depend on their counters and on nothing else."""

import numpy as np
import pytest

from worldvln_edge.noise import step_uniforms


def test_draws_are_those_of_the_specification():
    expected = np.random.Generator(np.random.Philox(key=[7, 2 * 2**32 + 3])).random((4, 2, 3, 16), dtype=np.float32)
    np.testing.assert_array_equal(step_uniforms(7, 2, 3, (4, 2, 3), 16), expected)


def test_every_counter_changes_the_draws():
    base = step_uniforms(1, 1, 1, (1, 2, 2), 8)
    for seed, clip, step in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1 + 2**40, 1, 1)):
        assert not np.array_equal(step_uniforms(seed, clip, step, (1, 2, 2), 8), base)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**70)])
def test_any_whole_number_is_a_seed(seed: int):
    draws = step_uniforms(seed, 0, 0, (1, 2, 2), 4)
    np.testing.assert_array_equal(draws, step_uniforms(seed % 2**64, 0, 0, (1, 2, 2), 4))
    assert draws.dtype == np.float32
    assert (draws >= 0).all()
    assert (draws < 1).all()
