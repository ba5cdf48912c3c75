"""Statistics of the inputs of linears, gathered while a module runs.

Legend: K input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.export.calibration import ActivationStatistics, CalibrationError, input_key
from worldvln_edge.export.precision import Precision

_ROBUST_SHARE = 0.9999
_BINS_PER_OCTAVE = 64  # the robust range is exact to 1.1 %
_LOWEST, _HIGHEST = -24, 24  # octaves; what lies outside counts as the nearest
_ROWS = 1024  # at a time: a histogram's indices are twice as large as what they count


class ActivationRecorder:
    """Running sums over the rows of one input; a forward pre-hook.

    Args:
        channels: K.
        device: where the sums are kept: that of the inputs.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.rows = 0
        self.sum_abs = torch.zeros(channels, dtype=torch.float64, device=device)
        self.sum_square = torch.zeros(channels, dtype=torch.float64, device=device)
        self.largest = torch.zeros(channels, device=device)
        self.histogram = torch.zeros((_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE, dtype=torch.int64, device=device)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for rows in inputs[0].detach().reshape(-1, inputs[0].shape[-1]).split(_ROWS):
            self._add(rows.float().abs())

    def _add(self, x: Tensor) -> None:
        self.rows += len(x)
        self.sum_abs += x.sum(0, dtype=torch.float64)
        self.sum_square += x.square().sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, x.amax(0))  # NaN stays
        octaves = torch.log2(x.flatten().nan_to_num().clamp(2.0**_LOWEST, 2.0 ** (_HIGHEST - 1)))
        bins = ((octaves - _LOWEST) * _BINS_PER_OCTAVE).long()
        self.histogram += torch.bincount(bins, minlength=len(self.histogram))

    def statistics(self, key: str) -> ActivationStatistics:
        """What was seen, on the CPU. Raises CalibrationError, which names `key`: nothing was."""
        if self.rows == 0:
            raise CalibrationError(f"no activation reached {key}; give at least one flight")
        largest = float(self.largest.max())
        below = self.histogram.cumsum(0)
        place = int(torch.searchsorted(below, int(np.ceil(_ROBUST_SHARE * int(below[-1])))))
        return ActivationStatistics(
            largest=largest,
            robust=min(largest, 2.0 ** ((place + 1) / _BINS_PER_OCTAVE + _LOWEST)),
            channel_largest=self.largest.cpu(),
            mean_abs=(self.sum_abs / self.rows).float().cpu(),
            mean_square=(self.sum_square / self.rows).float().cpu(),
        )


@contextmanager
def recording(
    module: nn.Module, prefix: str, device: torch.device | str = "cpu"
) -> Iterator[dict[str, ActivationRecorder]]:
    """Record the inputs of all linears that any precision quantises, each shared input once.

    Args:
        module: the world model, or a part of it.
        prefix: of its checkpoint keys, with the dot.
        device: of the inputs.

    Yields:
        Recorders by `input_key`; they stop when the block ends.
    """
    quantised = Precision(name="int8").quantised
    recorders: dict[str, ActivationRecorder] = {}
    handles = []
    for name, linear in module.named_modules():
        key = f"{prefix}{name}.weight"
        if isinstance(linear, nn.Linear) and quantised(key) and input_key(key) == key:
            recorders[key] = ActivationRecorder(linear.in_features, device)
            handles.append(linear.register_forward_pre_hook(recorders[key]))
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()
