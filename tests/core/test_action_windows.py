"""Which windows a segment needs, and how their predictions become its actions."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.action_windows import LabelStats, average_windows, context_frame, segment_actions, window_starts


def test_three_observed_frames_stand_in_front_where_they_exist():
    assert [context_frame(observed, 3) for observed in (1, 2, 3, 17, 33)] == [1, 1, 1, 15, 31]


@given(st.integers(2, 8), st.integers(1, 7), st.integers(0, 40))
def test_windows_cover_every_frame(window: int, stride: int, more: int):
    frames, stride = window + more, min(stride, window - 1)
    starts = window_starts(frames, window, stride)
    assert starts == sorted(set(starts))
    assert {frame for start in starts for frame in range(start, start + window)} == set(range(frames))


@pytest.mark.parametrize(("frames", "stride"), [(3, 1), (0, 1), (9, 0)])
def test_too_few_frames_are_refused(frames: int, stride: int):
    with pytest.raises(ValueError, match="hold no window of 4"):
        window_starts(frames, 4, stride)


@given(st.integers(4, 20), st.integers(0, 2**32 - 1))
def test_average_is_the_mean_of_all_predictions_of_a_motion(frames: int, seed: int):
    starts = window_starts(frames, 4)
    deltas = np.random.default_rng(seed).normal(size=(len(starts), 3, 6)).astype(np.float32)
    mean = average_windows(deltas, starts, frames)
    for t in range(1, frames):
        said = [deltas[k, j] for k in range(len(starts)) for j in range(3) if k + j + 1 == t]
        np.testing.assert_allclose(mean[t], np.mean(said, 0), atol=1e-6)
    assert not mean[0].any()


@pytest.mark.parametrize(("observed", "following", "frames"), [(1, 17, 17), (17, 33, 19), (33, 49, 19)])
def test_windows_that_agree_give_their_motion(observed: int, following: int, frames: int):
    """Every window predicts the true motion of its frames, so the actions are the labels in cm and deg."""
    first = following - frames + 1
    truth = np.random.default_rng(observed).normal(size=(60, 6)).astype(np.float32)  # row f: from frame f to f+1
    stats = LabelStats(mean_angles=(0.1, 0.2, 0.3), std_angles=(0.5, 0.6, 0.7), mean_t=(1, 2, 3), std_t=(0.1, 0.2, 0.3))
    windows = np.stack([truth[first + k : first + k + 3] for k in range(frames - 3)])
    logits = ((windows - stats.mean) / stats.std).reshape(len(windows), 18)
    actions = segment_actions(
        logits, stats, observed_frames=observed, next_observed_frames=following, left_context=3, window=4
    )
    expected = truth[observed:following]
    assert actions.shape == (16, 6)
    np.testing.assert_allclose(actions[:, :3], 100 * expected[:, 3:], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(actions[:, 3:], np.degrees(expected[:, [2, 0, 1]]), rtol=1e-4, atol=1e-3)


def test_without_statistics_logits_are_rad_and_m():
    logits = np.tile(np.array([0.1, 0, 0, 1, 2, 3] * 3, np.float32), (14, 1))
    actions = segment_actions(logits, None, observed_frames=1, next_observed_frames=17, left_context=3, window=4)
    np.testing.assert_allclose(actions, [[100, 200, 300, 0, np.degrees(0.1), 0]] * 16, rtol=1e-5)


def test_statistics_take_numpy_numbers_and_survive_json():
    row = np.array([0.1, 1 / 3, 2e-7])
    stats = LabelStats(mean_angles=row, std_angles=tuple(row), mean_t=row.astype(np.float32), std_t=tuple(row))
    assert stats.mean_angles == tuple(row.tolist())
    assert msgspec.json.decode(msgspec.json.encode(stats), type=LabelStats) == stats


@pytest.mark.parametrize(
    "change",
    [{"std_t": (1, -1, 1)}, {"mean_t": (1, np.nan, 1)}, {"std_angles": (np.inf,) * 3}, {"mean_angles": (1, 2)}],
)
def test_statistics_that_are_no_three_finite_numbers_are_refused(change):
    good = {"mean_angles": (0, 0, 0), "std_angles": (1, 1, 1), "mean_t": (0, 0, 0), "std_t": (1, 1, 1)}
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be 3 finite numbers"):
        LabelStats(**{**good, **change})
