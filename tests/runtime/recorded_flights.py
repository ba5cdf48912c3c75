"""What the tests of recordings share: servers that record, cameras whose pictures differ, and what a file says."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.recording.recorder import Recorder, RecorderConfig
from worldvln_edge.runtime.recording.recording_messages import FlightSettings, Message, Picture
from worldvln_edge.runtime.recording.recording_reader import Recording
from worldvln_edge.runtime.recording.replay import ReplayReport, replay
from worldvln_edge.runtime.sessions.policy import Policy


def picture(value: int, kind: str = "JPEG") -> bytes:
    """An encoded image of a colour of its own."""
    buffer = BytesIO()
    Image.fromarray(np.full((8, 12, 3), (value * 5 % 256, value, 40), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@contextmanager
def recording_server(
    policy: Policy, folder: Path, *, settings: FlightSettings | None = None, config: dict | None = None, **options
) -> Iterator[BackgroundServer]:
    """A server whose recordings are all written when the block has ended."""
    recorder = Recorder(
        folder, policy.info, settings, config=RecorderConfig(**{"least_free_bytes": 0, **(config or {})})
    )
    try:
        with BackgroundServer(policy, recorder=recorder, **options) as server:
            yield server
    finally:
        recorder.close()


def files(folder: Path) -> list[Path]:
    """In the order of sessions and parts."""
    return sorted(folder.glob("*.mcap"))


def messages(recording: Recording) -> list[Message]:
    return [timed.message for timed in recording]


def pictures(recording: Recording) -> list[Picture]:
    return [message for message in messages(recording) if isinstance(message, Picture)]


def kinds(recording: Recording) -> Counter:
    """How many messages there are of each kind."""
    return Counter(type(message).__name__ for message in messages(recording))


def replayed(recording: Recording, policy: Policy, **options) -> ReplayReport:
    return replay(recording.opening, messages(recording), policy, **options)
