"""What a recording holds, counted: frames, segments, holds, times, and what is missing."""

from __future__ import annotations

from statistics import median

import msgspec

from worldvln_edge.runtime.recording.foxglove_messages import image_format
from worldvln_edge.runtime.recording.recording_messages import (
    Answer,
    Closing,
    Gap,
    Instruction,
    Opening,
    Picture,
    Refusal,
    Segment,
)
from worldvln_edge.runtime.recording.recording_reader import Recording


class RecordingSummary(msgspec.Struct, kw_only=True):
    opening: Opening
    files: list[str]
    size_bytes: int
    began_ns: int = 0
    """Since 1970."""
    seconds: float = 0.0
    frames: dict[str, int] = {}
    """Pictures by format: jpeg, png, webp, bmp, rgb8."""
    picture_bytes: int = 0
    instructions: list[str] = []
    """In the order in which they held."""
    segments: int = 0
    profiles: dict[str, int] = {}
    """Segments by generation profile."""
    holds: dict[str, int] = {}
    """Segments that were answered as a hold, by reason."""
    late: int = 0
    """Segments that came after their deadline."""
    refusals: dict[str, int] = {}
    """Requests by error code."""
    median_ms: float | None = None
    """From the arrival of a request that was answered with a segment to its answer."""
    max_ms: float | None = None
    gaps: list[Gap] = []
    closing: Closing | None = None
    """None: the recording was cut, or the session flies."""
    problems: list[str] = []


def summarise(recording: Recording) -> RecordingSummary:
    """Read a recording once, from its beginning to where it can be read."""
    summary = RecordingSummary(
        opening=recording.opening,
        files=[part.name for part in recording.parts],
        size_bytes=sum(part.stat().st_size for part in recording.parts),
        instructions=[recording.opening.prompt],
    )
    answers_ms: list[float] = []
    for timed in recording:
        message = timed.message
        summary.began_ns = summary.began_ns or timed.time_ns
        summary.seconds = (timed.time_ns - summary.began_ns) / 1e9
        if isinstance(message, Picture):
            kind = "rgb8" if message.raw_hw is not None else image_format(message.data)
            _count(summary.frames, kind)
            summary.picture_bytes += len(message.data)
        elif isinstance(message, Instruction):
            if message.prompt != summary.instructions[-1]:
                summary.instructions.append(message.prompt)
        elif isinstance(message, Segment):
            summary.segments += 1
            _count(summary.profiles, message.profile)
            if message.hold is not None:
                _count(summary.holds, message.hold)
            summary.late += message.late_ms is not None
        elif isinstance(message, Answer):
            if message.segment >= 0:
                answers_ms.append(message.total_ms)
        elif isinstance(message, Refusal):
            _count(summary.refusals, message.code)
        elif isinstance(message, Gap):
            summary.gaps.append(message)
        elif isinstance(message, Closing):
            summary.closing = message
    if answers_ms:
        summary.median_ms, summary.max_ms = median(answers_ms), max(answers_ms)
    summary.problems = recording.problems
    return summary


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1
