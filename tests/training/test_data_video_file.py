"""Video files: exactly the wanted frames, and files that are whole or not there."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from flight_files import HW, files_no_larger_than, numbered_frames, numbered_video, numbers_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldvln_edge.training.data.video_file import decode_frames, read_video_index, write_video
from worldvln_edge.training.sim.shards import FlightDataError


def encode(path: Path, stamps: list[int], **options: str) -> Path:
    """A video with frames at the given 1/64 s, as other programs write it: long groups, frames out of order."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=64)
        stream.height, stream.width, stream.pix_fmt = *HW, "yuv420p"
        stream.options = {"g": "20", "bf": "3", **options}
        for frame, stamp in zip(numbered_frames(len(stamps)), stamps, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = stamp, Fraction(1, 64)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("video") / "v.mp4", 60)


@pytest.fixture(scope="module")
def out_of_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("video") / "b.mp4", [4 * i for i in range(60)])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(st.integers(0, 59), min_size=1, max_size=12))
def test_decoded_frames_are_those_asked_for_in_that_order(video: Path, out_of_order: Path, wanted: list[int]):
    assert numbers_of(decode_frames(video, wanted)) == wanted
    assert numbers_of(decode_frames(out_of_order, wanted)) == wanted


def test_frames_of_a_changing_rate_are_found_by_number(tmp_path: Path):
    stamps = [0, 4, 8, 9, 10, 11, 12, 40, 44, 100, 101, 160]
    path = encode(tmp_path / "v.mp4", stamps)
    assert numbers_of(decode_frames(path, [11, 7, 3])) == [11, 7, 3]
    index = read_video_index(path)
    np.testing.assert_allclose(index.times_s() - index.times_s()[0], np.array(stamps) / 64, atol=1e-6)
    assert not index.is_regular


def test_index_tells_rate_and_size(video: Path):
    index = read_video_index(video)
    assert (index.frames, index.hw, index.is_regular) == (60, HW, True)
    assert index.fps == pytest.approx(16)


def test_single_frame_has_no_rate(tmp_path: Path):
    index = read_video_index(numbered_video(tmp_path / "v.mp4", 1))
    assert (index.frames, index.fps, index.is_regular) == (1, 0.0, True)


def test_colours_and_odd_sizes_survive(tmp_path: Path):
    frame = np.zeros((33, 47, 3), np.uint8)
    frame[..., 0], frame[..., 1], frame[..., 2] = 200, 100, 30
    write_video(tmp_path / "v.mp4", [frame] * 3, 16)
    decoded = decode_frames(tmp_path / "v.mp4", [0, 1, 2])
    assert decoded.shape == (3, 33, 47, 3)
    np.testing.assert_allclose(decoded.astype(int), np.stack([frame] * 3), atol=6)


def test_decoded_pictures_are_not_darker(tmp_path: Path):
    """Colours that change from pixel to pixel, which the storage of colours at half size cannot keep."""
    rng = np.random.default_rng(0)
    frames = np.clip(rng.normal(120, 25, (3, 64, 64, 3)), 0, 255).astype(np.uint8)
    write_video(tmp_path / "v.mp4", frames, 16)
    decoded = decode_frames(tmp_path / "v.mp4", [0, 1, 2])
    assert np.abs((decoded.astype(float) - frames).mean((0, 1, 2))).max() < 0.5


def test_frame_after_the_end_is_refused(video: Path):
    with pytest.raises(FlightDataError, match=r"v\.mp4: frame 60 is wanted, the video holds 60"):
        decode_frames(video, [0, 60])


def test_missing_video_is_named(tmp_path: Path):
    with pytest.raises(FlightDataError, match=r"none\.mp4: No such file"):
        decode_frames(tmp_path / "none.mp4", [0])


def test_file_that_is_no_video_is_refused(tmp_path: Path):
    (tmp_path / "v.mp4").write_bytes(b"not a video" * 50)
    with pytest.raises(FlightDataError, match=r"v\.mp4: broken video"):
        decode_frames(tmp_path / "v.mp4", [0])


def test_video_without_its_end_is_refused(video: Path, tmp_path: Path):
    cut = tmp_path / "v.mp4"
    cut.write_bytes(video.read_bytes()[:-200])
    with pytest.raises(FlightDataError, match=r"v\.mp4: broken video"):
        decode_frames(cut, [0])


def test_video_with_missing_frames_says_how_many(tmp_path: Path):
    """Its table of contents comes first, so that the file opens."""
    whole = tmp_path / "whole.mp4"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for noise in np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(FlightDataError, match=r"cut\.mp4: broken video, \d+ of 20 frames are there"):
        read_video_index(cut)


def test_bare_stream_without_time_stamps_is_refused(tmp_path: Path):
    with av.open(str(tmp_path / "v.h264"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *HW, "yuv420p"
        for frame in numbered_frames(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(FlightDataError, match=r"v\.h264: frames without time stamps; write it again as mp4"):
        read_video_index(tmp_path / "v.h264")


def test_frames_with_one_time_stamp_are_refused(tmp_path: Path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.height, stream.width, stream.pix_fmt = *HW, "yuvj420p"
        for i, frame in enumerate(numbered_frames(4)):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                packet.pts = packet.dts = [0, 1, 1, 2][i]
                container.mux(packet)
    with pytest.raises(FlightDataError, match=r"v\.mkv: two frames have one time stamp"):
        read_video_index(tmp_path / "v.mkv")


def test_video_that_was_never_filled_is_refused(tmp_path: Path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *HW, "yuv420p"
        container.start_encoding()
    with pytest.raises(FlightDataError, match=r"v\.mkv: (broken video|the video holds no frames)"):
        read_video_index(tmp_path / "v.mkv")


def test_sound_alone_is_no_video(tmp_path: Path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(FlightDataError, match=r"v\.mp4: no video in it"):
        read_video_index(tmp_path / "v.mp4")


def test_changed_file_is_read_again(tmp_path: Path):
    path = numbered_video(tmp_path / "v.mp4", 5)
    assert read_video_index(path).frames == 5
    assert read_video_index(numbered_video(path, 9)).frames == 9


def test_failing_writer_leaves_nothing(tmp_path: Path):
    frames = [*numbered_frames(1), *numbered_frames(1, (8, 8))]
    with pytest.raises(ValueError, match=r"a frame of \(8, 8\) follows frames of \(32, 48\)"):
        write_video(tmp_path / "v.mp4", frames, 16)
    assert list(tmp_path.iterdir()) == []


def test_video_without_frames_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match=r"v\.mp4: a video needs at least one frame"):
        write_video(tmp_path / "v.mp4", [], 16)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), np.uint8)
    with files_no_larger_than(20_000), pytest.raises(FlightDataError, match=r"v\.mp4: cannot be written .*nothing was"):
        write_video(tmp_path / "v.mp4", noise, 16)
    assert list(tmp_path.iterdir()) == []
