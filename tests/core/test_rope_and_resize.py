"""Position tables and resize matrices, against formulas written out and against PyTorch's interpolation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.presets import nano
from worldvln_edge.resize import area_matrix, linear_matrix
from worldvln_edge.rope import grid_positions, text_rope, visual_rope
from worldvln_edge.scale_schedule import ScaleSchedule

sizes = st.integers(1, 24)


@given(sizes, sizes)
def test_area_matrix_is_adaptive_average_pooling(out_size: int, in_size: int):
    x = torch.randn(1, 1, in_size, generator=torch.Generator().manual_seed(in_size), dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(x, out_size)
    np.testing.assert_allclose(area_matrix(out_size, in_size) @ x[0, 0].numpy(), expected[0, 0], atol=1e-6)


@given(sizes, sizes)
def test_linear_matrix_is_linear_interpolation(out_size: int, in_size: int):
    x = torch.randn(1, 1, in_size, generator=torch.Generator().manual_seed(in_size))
    expected = F.interpolate(x, out_size, mode="linear", align_corners=False)
    np.testing.assert_allclose(linear_matrix(out_size, in_size) @ x[0, 0].numpy(), expected[0, 0], atol=2e-5)


@given(sizes, sizes)
def test_rows_of_both_sum_to_one(out_size: int, in_size: int):
    for matrix in (area_matrix(out_size, in_size), linear_matrix(out_size, in_size)):
        assert matrix.shape == (out_size, in_size)
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)


@given(sizes)
def test_equal_sizes_change_nothing(size: int):
    np.testing.assert_array_equal(area_matrix(size, size), np.eye(size))
    np.testing.assert_array_equal(linear_matrix(size, size), np.eye(size))


def test_shared_matrices_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        area_matrix(2, 4)[0, 0] = 1


def test_positions_are_rounded_in_single_precision():
    assert grid_positions(16, 40).tolist() == [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28, 30, 32, 35, 38]
    assert 29 in grid_positions(14, 57)  # exact arithmetic would give 28
    assert grid_positions(1, 40).tolist() == [0]


def test_text_turns_along_the_scale_axis_only():
    cos, sin = text_rope(5, 32)
    assert cos.shape == (5, 16)
    inverse = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(cos[:, :4], np.cos(np.arange(5)[:, None] * inverse), atol=1e-6)
    np.testing.assert_allclose(sin[:, :4], np.sin(np.arange(5)[:, None] * inverse), atol=1e-6)
    assert (cos[:, 4:] == 1).all()
    assert (sin[:, 4:] == 0).all()


def test_visual_tokens_turn_by_scale_frame_row_and_column():
    config = nano()
    schedule = ScaleSchedule(config.schedule, 13)
    step, clip = schedule.clips[2].steps[1], schedule.clips[2]
    cos, sin = visual_rope(step, clip.first_frame, (4, 4), 32, 32)
    t, h, w = step.thw
    assert cos.shape == (t * h * w, 16)
    inverse = (1 / np.float32(10000) ** (np.arange(4, dtype=np.float32) / 4)).astype(np.float64)
    token = 0
    for frame in range(t):
        for row in range(h):
            for col in range(w):
                axes = (32 + step.real_scale_id, clip.first_frame + frame, 2 * row, 2 * col)
                angles = np.concatenate([position * inverse for position in axes])
                np.testing.assert_allclose(cos[token], np.cos(angles), atol=1e-5)
                np.testing.assert_allclose(sin[token], np.sin(angles), atol=1e-5)
                token += 1
