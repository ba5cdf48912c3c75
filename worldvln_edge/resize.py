"""Interpolation as small constant matrices: `area` down and `trilinear` up, one matrix per axis.

Both resizes of the quantiser are separable and linear, so an axis of N entries becomes n entries by an [n, N] matrix.
That form is portable to ONNX and TensorRT, where adaptive pooling and 5-D resize are not.
Source: spec/video_vae.md 6 ("Interpolation"), spec/world_model.md 5.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1024)
def area_matrix(out_size: int, in_size: int) -> np.ndarray:
    """Adaptive average pooling of one axis: float32 [out_size, in_size], read-only, rows sum to 1."""
    matrix = np.zeros((out_size, in_size), np.float32)
    for o in range(out_size):
        first, end = o * in_size // out_size, -((o + 1) * in_size // -out_size)
        matrix[o, first:end] = np.float32(1.0) / np.float32(end - first)
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=1024)
def linear_matrix(out_size: int, in_size: int) -> np.ndarray:
    """Linear interpolation of one axis, align_corners=False, no antialias: float32 [out_size, in_size], read-only."""
    matrix = np.zeros((out_size, in_size), np.float32)
    scale = np.float32(in_size / out_size)
    for o in range(out_size):
        source = max((np.float32(o) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0.0))
        low = min(int(source), in_size - 1)
        high = min(low + 1, in_size - 1)
        weight = np.float32(source - np.float32(low)) if high != low else np.float32(0.0)
        matrix[o, low] += np.float32(1.0) - weight
        matrix[o, high] += weight
    matrix.setflags(write=False)
    return matrix
