"""Coarse flow: the teacher of ego-motion must itself be right."""

import numpy as np
import pytest
import torch
from PIL import Image

from worldvln_edge.training.stages.optical_flow import coarse_flow


def _texture(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("right", "down"), [(2, 0), (-2, 0), (0, 2), (2, -2), (0, 0)])
def test_shifted_picture_gives_its_shift(right: int, down: int):
    picture = _texture()
    crops = [picture[16 - t * down : 80 - t * down, 16 - t * right : 80 - t * right] for t in range(3)]
    frames = torch.from_numpy(np.stack(crops)[None, ..., None].repeat(3, -1))
    flow = coarse_flow(frames, (4, 4))
    assert flow.shape == (1, 2, 2, 4, 4)
    # Two pixels are one pixel of the half-size image; gradients over three pixels see a little less of it.
    expected = torch.tensor([right / 2, down / 2])
    torch.testing.assert_close(flow.mean((0, 1, 3, 4)), expected, atol=0.25, rtol=0)


def test_flat_picture_has_no_flow():
    frames = torch.full((1, 2, 32, 32, 3), 90, dtype=torch.uint8)
    assert coarse_flow(frames, (2, 2)).abs().max() == 0
