"""Measuring activations: flights through the PyTorch world model, with a recorder in front of every quantised linear.

What is flown is what the bundle flies: text, observed scales and generated scales of every segment, with guidance.

Legend: F frames, H W pixels, K input channels.
Source: spec/world_model.md 2.3 (block), 6 (loop).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.export.calibration import ActivationStatistics, Calibration, CalibrationError, input_key
from worldvln_edge.export.precision import Precision
from worldvln_edge.export.torch_flight import fly_in_torch
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.tokenizer import PromptTokenizer

Flight = tuple[np.ndarray, str]
"""(uint8 RGB [F, H, W, 3], instruction)"""

_ROBUST_SHARE = 0.9999
_BINS_PER_OCTAVE = 64  # the robust range is exact to 1.1 %
_LOWEST, _HIGHEST = -24, 24  # octaves; what lies outside counts as the nearest
_NOISE = 0.8  # neighbouring pixels of independent noise differ by 1 in these units, those of pictures by far less


def collect(
    checkpoint: Checkpoint,
    flights: Iterable[Flight],
    *,
    checkpoint_sha256: str,
    source: str,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Fly and measure.

    Args:
        checkpoint: in float32.
        flights: frames of any size, and their instructions.
        checkpoint_sha256: `CheckpointSource.fingerprint()` of the checkpoint.
        source: where the flights come from, for the manifest.
        seed: of the draws in the first flight; each further flight has the next.
        progress: called with the number of flights that are done.

    Raises:
        CalibrationError: no flights, frames that are constant, noise or too few, or activations that are not finite.
        TokenizerError: the checkpoint's tokenizer is unusable.
    """
    config = checkpoint.config
    tokenizer = PromptTokenizer.load(checkpoint.tokenizer_file, config.world_model.text_max_tokens)
    recorders: dict[str, _Recorder] = {}
    flown = frames_seen = 0
    with _recording(checkpoint.model.world_model, recorders):
        for frames, instruction in flights:
            check_frames(frames, f"flight {flown} of {source}", at_least=config.horizon.points[-2])
            ids = tokenizer.encode(tagged_prompt(instruction, config.horizon))[None]
            used = list(frames[: config.horizon.points[-2]])
            fly_in_torch(checkpoint, ids, used, seed=seed + flown)
            flown += 1
            frames_seen += len(used)
            if progress is not None:
                progress(flown)
    return Calibration.build(
        {key: recorder.statistics(key) for key, recorder in recorders.items()},
        config=config,
        checkpoint_sha256=checkpoint_sha256,
        source=source,
        flights=flown,
        frames=frames_seen,
    )


def check_frames(frames: np.ndarray, place: str, *, at_least: int) -> None:
    """Raise CalibrationError for frames that no camera took, or too few of them.

    Args:
        frames: uint8 [F, H, W, 3].
        place: names them in the error.
        at_least: frames that a flight needs.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape[1:3]) < 2:
        raise CalibrationError(f"{place}: {frames.dtype} {list(frames.shape)}, needed are uint8 RGB [F, H, W, 3]")
    if len(frames) < at_least:
        raise CalibrationError(f"{place}: {len(frames)} frames, the horizon needs {at_least}; use longer flights")
    sample = frames[:: max(1, len(frames) // 8)].astype(np.float32)
    spread = float(sample.var())
    if spread < 1:
        raise CalibrationError(
            f"{place}: the frames are of one colour; calibrate on frames of real or simulated flights"
        )
    difference = float(np.square(np.diff(sample, axis=2)).mean()) / (2 * spread)
    if difference > _NOISE:
        raise CalibrationError(
            f"{place}: the frames look like random noise, on which ranges are wrong; calibrate on frames of real or "
            "simulated flights"
        )


@contextmanager
def _recording(model: nn.Module, recorders: dict[str, _Recorder]) -> Iterator[None]:
    """Record the inputs of all linears that any precision quantises, each shared input once."""
    quantised = Precision(name="int8").quantised
    handles = []
    for name, module in model.named_modules():
        key = f"world_model.{name}.weight"
        if isinstance(module, nn.Linear) and quantised(key) and input_key(key) == key:
            recorder = recorders[key] = _Recorder(module.in_features)
            handles.append(module.register_forward_pre_hook(recorder))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Running sums over the rows of one input."""

    def __init__(self, channels: int):
        self.rows = 0
        self.sum_abs = torch.zeros(channels, dtype=torch.float64)
        self.sum_square = torch.zeros(channels, dtype=torch.float64)
        self.largest = torch.zeros(channels)
        self.histogram = torch.zeros((_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE, dtype=torch.int64)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().abs()
        self.rows += len(x)
        self.sum_abs += x.sum(0, dtype=torch.float64)
        self.sum_square += x.square().sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, x.amax(0))  # NaN stays
        octaves = torch.log2(x.flatten().nan_to_num().clamp(2.0**_LOWEST, 2.0 ** (_HIGHEST - 1)))
        bins = ((octaves - _LOWEST) * _BINS_PER_OCTAVE).long()
        self.histogram += torch.bincount(bins, minlength=len(self.histogram))

    def statistics(self, key: str) -> ActivationStatistics:
        if self.rows == 0:
            raise CalibrationError(f"no activation reached {key}; give at least one flight")
        largest = float(self.largest.max())
        below = self.histogram.cumsum(0)
        place = int(torch.searchsorted(below, int(np.ceil(_ROBUST_SHARE * int(below[-1])))))
        return ActivationStatistics(
            largest=largest,
            robust=min(largest, 2.0 ** ((place + 1) / _BINS_PER_OCTAVE + _LOWEST)),
            channel_largest=self.largest,
            mean_abs=(self.sum_abs / self.rows).float(),
            mean_square=(self.sum_square / self.rows).float(),
        )
