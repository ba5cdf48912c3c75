"""Lucas-Kanade flow on a coarse grid: a dense, local teacher for ego-motion.

A small VAE learns motion slowly from a few numbers a frame, but quickly from a flow vector per grid cell: every cell of
every frame is one more example of the same local rule. Nothing of this is used in flight.

Legend: B rows, F frames, h w grid cells. Flow is in pixels of the half-size image, per frame, x to the right, y down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 2e-4  # keeps flat cells at zero flow instead of noise; grey levels are in [0, 1]
_LIMIT = 3.0


def coarse_flow(frames_BFHW3: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Flow from each frame to the next: float32 [B, F-1, 2, h, w], clipped to +-3 pixels.

    Args:
        frames_BFHW3: uint8 RGB.
        grid_hw: cells; one least-squares flow each.
    """
    grey = frames_BFHW3.float().mean(-1) / 255
    grey = F.avg_pool2d(grey, 2)
    smooth = (grey[:, 1:] + grey[:, :-1]) / 2
    gx = F.pad(smooth[..., :, 2:] - smooth[..., :, :-2], (1, 1)) / 2
    gy = F.pad(smooth[..., 2:, :] - smooth[..., :-2, :], (0, 0, 1, 1)) / 2
    gt = grey[:, 1:] - grey[:, :-1]

    def cells(product: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(product, grid_hw)

    xx, yy, xy = cells(gx * gx) + _RIDGE, cells(gy * gy) + _RIDGE, cells(gx * gy)
    xt, yt = cells(gx * gt), cells(gy * gt)
    determinant = xx * yy - xy * xy
    u = -(yy * xt - xy * yt) / determinant
    v = -(xx * yt - xy * xt) / determinant
    return torch.stack((u, v), 2).clamp(-_LIMIT, _LIMIT)
