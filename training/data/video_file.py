"""Video files: exactly the wanted frames out, and frames in.

Frames are numbered in the order they are shown, and found by their time stamp: the file's packets are listed once
(without decoding), so a number means the same frame whatever the frame rate, and seeking loses none.
Legend: n frames, H W pixels. Source: spec/training.md 1.2 (Product).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import av
import numpy as np

from worldvln_edge.atomic import atomic_file
from worldvln_edge.images import fit_frame
from worldvln_edge.training.sim.shards import FlightDataError

_FILES_REMEMBERED = 256
_UNBIASED = 0x2 | 0x2000 | 0x40000
"""SWS_BILINEAR, SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND of libswscale, which PyAV names in its newest versions only.

Its default is faster and rounds down: pictures come out 1.3 grey levels darker than the camera's frames of a flight.
"""


@dataclass(frozen=True)
class VideoIndex:
    """What a video file holds, without its pixels."""

    stamps: np.ndarray  # int64 [frames], ascending, in units of `time_base`
    keyframes: np.ndarray  # int64, stamps from which decoding can start
    time_base: Fraction
    hw: tuple[int, int]

    @property
    def frames(self) -> int:
        return len(self.stamps)

    @property
    def fps(self) -> float:
        """Mean rate, frames a second; 0 for a single frame."""
        if self.frames < 2:
            return 0.0
        return float((self.frames - 1) / ((int(self.stamps[-1]) - int(self.stamps[0])) * self.time_base))

    @property
    def is_regular(self) -> bool:
        """Whether no step between two frames is half a frame longer or shorter than the mean."""
        steps = np.diff(self.stamps)
        return len(steps) == 0 or bool(np.abs(steps / steps.mean() - 1).max() < 0.5)

    def times_s(self) -> np.ndarray:
        """When every frame is shown, seconds of the container: float64 [frames]."""
        return self.stamps * float(self.time_base)


def read_video_index(path: Path) -> VideoIndex:
    """List the frames of a video.

    Raises:
        FlightDataError: no such file, no video, cut off, or two frames with one time stamp.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise FlightDataError(f"{path}: {error.strerror}") from error
    return _video_index(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=_FILES_REMEMBERED)
def _video_index(path: str, size: int, mtime_ns: int) -> VideoIndex:  # size and date: a changed file is read again
    with _opened(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size]
        # An edit list may hide frames; a decoder does not give those out.
        shown = [p for p in packets if not p.is_discard]
        shown_at = [p.pts for p in shown if p.pts is not None]
        if len(shown_at) < len(shown) or stream.time_base is None:
            raise FlightDataError(f"{path}: frames without time stamps; write it again as mp4")
        if not shown:
            raise FlightDataError(f"{path}: the video holds no frames")
        if len(packets) < stream.frames:
            raise FlightDataError(
                f"{path}: broken video, {len(packets)} of {stream.frames} frames are there; copy it again"
            )
        stamps = np.array(sorted(shown_at), np.int64)
        if (np.diff(stamps) <= 0).any():
            raise FlightDataError(f"{path}: two frames have one time stamp; write the video again")
        keyframes = np.array(sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None), np.int64)
        return VideoIndex(stamps, keyframes, Fraction(stream.time_base), (stream.height, stream.width))


def decode_frames(path: Path, frames: Sequence[int], image_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Decode the named frames and no others: uint8 RGB [n, H, W, 3], in the order asked for.

    Args:
        path: video file.
        frames: frame numbers from 0; a number may come twice.
        image_hw: cover and cut every frame to that size as it is decoded; None leaves it as it is.

    Raises:
        FlightDataError: what `read_video_index` refuses, a frame after the end, or a frame that cannot be decoded.
    """
    index = read_video_index(path)
    wanted = sorted(set(frames))
    if wanted and wanted[-1] >= index.frames:
        raise FlightDataError(f"{path}: frame {wanted[-1]} is wanted, the video holds {index.frames}")
    decoded: dict[int, np.ndarray] = {}
    with _opened(str(path)) as (container, stream):
        for run in _runs(index, wanted):
            decoded.update(_decode_run(container, stream, index, run, image_hw))
            if any(frame not in decoded for frame in run):  # a container that cannot seek there
                decoded.update(_decode_run(container, stream, index, run, image_hw, from_start=True))
    missing = [frame for frame in wanted if frame not in decoded]
    if missing:
        raise FlightDataError(f"{path}: broken video, frame {missing[0]} cannot be decoded; copy it again")
    return np.stack([decoded[frame] for frame in frames])


def _runs(index: VideoIndex, wanted: list[int]) -> list[list[int]]:
    """Cut where a whole group of frames between two keyframes can be left out."""
    groups = np.searchsorted(index.keyframes, index.stamps[wanted], side="right")
    cuts = np.flatnonzero(np.diff(groups) > 1) + 1
    return [run.tolist() for run in np.split(np.array(wanted), cuts) if len(run)]


def _decode_run(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: VideoIndex,
    run: list[int],
    image_hw: tuple[int, int] | None,
    *,
    from_start: bool = False,
) -> dict[int, np.ndarray]:
    stamps = {int(index.stamps[frame]): frame for frame in run}
    last = max(stamps)
    container.seek(int(index.stamps[0]) if from_start else min(stamps), stream=stream, backward=True)
    found: dict[int, np.ndarray] = {}
    for picture in container.decode(stream):
        if picture.pts in stamps and not picture.is_corrupt:
            frame = picture.to_ndarray(format="rgb24", interpolation=_UNBIASED)
            found[stamps[picture.pts]] = frame if image_hw is None else fit_frame(frame, image_hw)
        if picture.pts is not None and picture.pts >= last:
            break
    return found


@contextmanager
def _opened(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its video stream; what FFmpeg refuses becomes a FlightDataError that names the file."""
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise FlightDataError(f"{path}: no video in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # rows are decoded by many worker processes already
            yield container, stream
    except av.FFmpegError as error:
        raise FlightDataError(
            f"{path}: broken video ({error.strerror}); copy it again or leave its rows out"
        ) from error


class VideoWriter(AbstractContextManager["VideoWriter"]):
    """Writes one H.264 mp4, whole or not at all: `with VideoWriter(path, fps) as video: video.add(frame)`.

    A keyframe a second keeps seeking cheap. Frames of an odd size are stored without chroma subsampling, which needs
    even sides.
    """

    def __init__(self, path: Path, fps: int, *, crf: int = 18):
        self.path = path
        self.frames = 0
        self._fps, self._crf = fps, crf
        self._place = atomic_file(path)
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._hw: tuple[int, int] | None = None

    def __enter__(self) -> VideoWriter:
        self._building = self._place.__enter__()
        self._container = av.open(str(self._building), "w", format="mp4")
        return self

    def add(self, frame_HW3: np.ndarray) -> None:
        """Append a frame, uint8 RGB. All frames of a file have one size, else ValueError."""
        hw = (int(frame_HW3.shape[0]), int(frame_HW3.shape[1]))
        if self._stream is None:
            self._hw, self._stream = hw, self._open_stream(hw)
        if hw != self._hw:
            raise ValueError(f"{self.path}: a frame of {hw} follows frames of {self._hw}")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
        picture.pts = self.frames
        picture.time_base = Fraction(1, self._fps)
        self.frames += 1
        self._write(picture)

    @property
    def written_bytes(self) -> int:
        """Size so far; the encoder holds some frames back."""
        return self._building.stat().st_size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._container is not None
        try:
            if kind is None:
                if self._stream is None:
                    raise ValueError(f"{self.path}: a video needs at least one frame")
                self._write(None)
            self._container.close()
        except (OSError, av.FFmpegError) as failure:
            self._place.__exit__(type(failure), failure, failure.__traceback__)
            raise _not_written(self.path, failure) from failure
        except BaseException as failure:
            self._place.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self._place.__exit__(kind, error, trace)

    def _open_stream(self, hw: tuple[int, int]) -> av.VideoStream:
        assert self._container is not None
        stream = self._container.add_stream("libx264", rate=self._fps)
        stream.height, stream.width = hw
        stream.pix_fmt = "yuv420p" if hw[0] % 2 == 0 and hw[1] % 2 == 0 else "yuv444p"
        stream.options = {"crf": str(self._crf), "g": str(self._fps)}
        stream.time_base = Fraction(1, self._fps)
        return stream

    def _write(self, picture: av.VideoFrame | None) -> None:
        assert self._container is not None
        assert self._stream is not None
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        except (OSError, av.FFmpegError) as error:
            raise _not_written(self.path, error) from error


def _not_written(path: Path, error: OSError | av.FFmpegError) -> FlightDataError:
    return FlightDataError(f"{path}: cannot be written ({error.strerror or error}); nothing was left behind")


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> int:
    """Write frames (uint8 RGB [H, W, 3]) as a video file; returns how many."""
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.add(frame)
    return video.frames
