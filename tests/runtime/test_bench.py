"""`worldvln-edge bench`: what it flies, what it counts, what it prints."""

import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.runtime.bench import BenchConfig, fly_segments, synthetic_frames
from worldvln_edge.runtime.null_policy import NullPolicy


def test_flies_as_many_segments_as_asked_also_across_flights():
    config = BenchConfig(segments=4, warm_up_segments=1, frame_hw=(24, 32))
    timings = list(fly_segments(NullPolicy(), config))
    assert len(timings) == 5
    for timing in timings:
        assert timing.segment_ms >= timing.stages_ms["generate"] >= 0


def test_frames_move_and_are_the_same_for_a_seed():
    frames = synthetic_frames((24, 32), 3, seed=1)
    again = synthetic_frames((24, 32), 3, seed=1)
    assert [frame.shape for frame in frames] == [(24, 32, 3)] * 3
    np.testing.assert_array_equal(frames, again)
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("bad", [{"segments": 0}, {"warm_up_segments": -1}, {"frame_hw": (0, 640)}])
def test_impossible_bench_is_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        BenchConfig(**bad)


@pytest.mark.parametrize("text", ["640", "640x", "x480", "0x480", "640x99999", "640x480x3"])
def test_bad_frame_size_is_wrong_usage(text, tmp_path):
    result = CliRunner().invoke(cli.main, ["bench", str(tmp_path), "--frame-size", text])
    assert result.exit_code == 2
    assert "for example 640x480" in result.output


def test_folder_that_is_no_bundle_is_one_line_and_exit_1(tmp_path):
    result = CliRunner().invoke(cli.main, ["bench", str(tmp_path)])
    assert result.exit_code == 1
    assert "is no bundle: manifest.json is missing" in result.output
    assert "Traceback" not in result.output
