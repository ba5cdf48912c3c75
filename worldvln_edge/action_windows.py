"""From window logits to the actions of a segment: de-normalise, average overlapping windows, slice, convert units.

Legend: K windows, k window, j motion inside a window, F frames, frame indices 1-based.
Source: spec/action_decoder.md 4, 5.
"""

import math

import msgspec
import numpy as np

from worldvln_edge.poses import deltas_to_actions


class LabelStats(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and standard deviation of the labels; angles in the order yaw, pitch, roll (rad), translation in m.

    Any three numbers are taken, numpy's included, and kept as plain floats, so that they can be written as JSON.

    Raises:
        ValueError: not three finite numbers, or a negative deviation.
    """

    mean_angles: tuple[float, float, float]
    std_angles: tuple[float, float, float]
    mean_t: tuple[float, float, float]
    std_t: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            numbers = tuple(float(value) for value in getattr(self, name))
            lowest = 0.0 if name.startswith("std") else -math.inf
            if len(numbers) != 3 or not all(math.isfinite(n) and n >= lowest for n in numbers):
                above = " >= 0" if lowest == 0 else ""
                raise ValueError(f"label statistics: {name} must be 3 finite numbers{above}, found {numbers}")
            msgspec.structs.force_setattr(self, name, numbers)

    @classmethod
    def of_labels(cls, deltas_M6: np.ndarray) -> "LabelStats":
        """Mean and population deviation of labels, deviation at least 1e-6 (spec/training.md 4.1).

        Args:
            deltas_M6: labels of real motions (no rows for first frames), rad and m.
        """
        rows = np.asarray(deltas_M6, np.float64)
        mean, std = rows.mean(0), np.maximum(rows.std(0), 1e-6)
        return cls(mean_angles=tuple(mean[:3]), std_angles=tuple(std[:3]), mean_t=tuple(mean[3:]), std_t=tuple(std[3:]))

    def normalise(self, deltas: np.ndarray) -> np.ndarray:
        """Labels [..., 6] in units of their deviation, float32."""
        return (np.asarray(deltas, np.float32) - self.mean) / self.std

    def denormalise(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `normalise`: rad and m."""
        return np.asarray(values, np.float32) * self.std + self.mean

    @property
    def mean(self) -> np.ndarray:
        return np.array(self.mean_angles + self.mean_t, np.float32)

    @property
    def std(self) -> np.ndarray:
        return np.array(self.std_angles + self.std_t, np.float32)


def context_frame(observed_frames: int, left_context: int) -> int:
    """First frame (1-based) that the windows of a segment look at."""
    return max(1, observed_frames - left_context + 1)


def window_starts(frames: int, window: int, stride: int = 1) -> list[int]:
    """First frames (0-based) of the windows over `frames` frames; the last one is aligned to the end.

    Raises:
        ValueError: fewer frames than one window, or a stride below 1.
    """
    if frames < window or stride < 1:
        raise ValueError(
            f"{frames} frames at stride {stride} hold no window of {window}; send at least {window} frames"
        )
    starts = list(range(0, frames - window + 1, stride))
    if starts[-1] != frames - window:
        starts.append(frames - window)
    return starts


def average_windows(window_deltas: np.ndarray, starts: list[int], frames: int) -> np.ndarray:
    """Mean of all window predictions of a motion: [frames, 6]; row t is the motion from frame t-1 to t.

    Args:
        window_deltas: [K, window-1, 6], de-normalised; float64 is averaged in float64, anything else in float32.
        starts: first frame (0-based) of each window.
        frames: number of frames; row 0 stays zero.
    """
    precision = np.result_type(window_deltas.dtype, np.float32)
    total, count = np.zeros((frames, 6), precision), np.zeros((frames, 1), precision)
    for start, deltas in zip(starts, window_deltas, strict=True):
        total[start + 1 : start + 1 + len(deltas)] += deltas
        count[start + 1 : start + 1 + len(deltas)] += 1
    return total / np.maximum(count, 1)


def segment_actions(
    logits: np.ndarray,
    stats: LabelStats | None,
    *,
    observed_frames: int,
    next_observed_frames: int,
    left_context: int,
    window: int,
    stride: int = 1,
) -> np.ndarray:
    """Actions of one segment from the window logits over frames context..next_observed_frames.

    Args:
        logits: float32 [K, 6*(window-1)], before de-normalisation.
        stats: label statistics; None uses the logits directly as rad and m.
        observed_frames, next_observed_frames: the segment moves frame `observed_frames` to `next_observed_frames`.
        left_context, window, stride: as in `ActionDecoderConfig`.

    Returns:
        float32 [next_observed_frames - observed_frames, 6], cm and deg.
    """
    first = context_frame(observed_frames, left_context)
    frames = next_observed_frames - first + 1
    deltas = np.asarray(logits, np.float32).reshape(len(logits), window - 1, 6)
    if stats is not None:
        deltas = stats.denormalise(deltas)
    motion = average_windows(deltas, window_starts(frames, window, stride), frames)
    return deltas_to_actions(motion[observed_frames - first + 1 :])
