"""4-D rotary position angles: (scale, frame, row, column).

Legend: n = head_dim / 8 frequencies per axis; L tokens of a step, frame-major, then row, then column.
Source: spec/world_model.md 2.5.
"""

import numpy as np

from worldvln_edge.scale_schedule import ScaleStep

_BASE = 10000.0


def _inverse_frequencies(head_dim: int) -> np.ndarray:
    n = head_dim // 8
    return (1.0 / _BASE ** (np.arange(n, dtype=np.float32) / n)).astype(np.float32)


def _table(positions_L4: np.ndarray, head_dim: int) -> np.ndarray:
    angles = positions_L4[:, :, None].astype(np.float32) * _inverse_frequencies(head_dim)
    angles = angles.reshape(len(positions_L4), head_dim // 2)
    return np.stack([np.cos(angles), np.sin(angles)])


def grid_positions(size: int, full_size: int) -> np.ndarray:
    """Positions of `size` rows (or columns) on the grid of the last scale: float32 product, rounded half to even."""
    return np.rint(np.arange(size, dtype=np.float32) * np.float32(full_size / size)).astype(np.int64)


def text_rope(tokens: int, head_dim: int) -> np.ndarray:
    """Cos and sin of text positions 0..tokens-1: float32 [2, tokens, head_dim/2]."""
    positions = np.zeros((tokens, 4), np.int64)
    positions[:, 0] = np.arange(tokens)
    return _table(positions, head_dim)


def visual_rope(
    step: ScaleStep, first_frame: int, latent_hw: tuple[int, int], text_max_tokens: int, head_dim: int
) -> np.ndarray:
    """Cos and sin of the tokens of one step: float32 [2, T*h*w, head_dim/2].

    Args:
        step: the step; its real scale id gives the scale position.
        first_frame: first latent frame of the step's clip.
        latent_hw: rows and columns of the last scale.
        text_max_tokens: scale position of real scale id 0 (512 in the released model).
        head_dim: width of one attention head.
    """
    t, h, w = step.thw
    positions = np.empty((t, h, w, 4), np.int64)
    positions[..., 0] = text_max_tokens + step.real_scale_id
    positions[..., 1] = (first_frame + np.arange(t))[:, None, None]
    positions[..., 2] = grid_positions(h, latent_hw[0])[None, :, None]
    positions[..., 3] = grid_positions(w, latent_hw[1])[None, None, :]
    return _table(positions.reshape(-1, 4), head_dim)
