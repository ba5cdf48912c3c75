"""The server's Prometheus metrics: what it did, how long each stage took, what it turned away.

Every server has a registry of its own; nothing is global. Names begin with `worldvln_`; docs/operations.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from worldvln_edge import __version__
from worldvln_edge.protocol import ERRORS, StageTimes
from worldvln_edge.runtime.sessions.policy import ActionChunk, PolicyInfo
from worldvln_edge.runtime.sessions.process_memory import resident_bytes

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class RecorderState(Protocol):
    """What a flight recorder says of itself."""

    @property
    def is_recording(self) -> bool: ...

    @property
    def written_bytes(self) -> int: ...

    @property
    def lost_frames(self) -> int: ...

    @property
    def lost_events(self) -> int: ...


class ServerMetrics:
    """A `Meter` that Prometheus can read.

    Args:
        info: of the policy; labels of `worldvln_server_info`.
    """

    def __init__(self, info: PolicyInfo):
        self._registry = registry = CollectorRegistry()
        server = Gauge("worldvln_server_info", "What is served; always 1.", _INFO_LABELS, registry=registry)
        server.labels(__version__, info.name, info.precision, info.backend, info.device).set(1)
        self._sessions = Gauge("worldvln_sessions", "Open sessions.", registry=registry)
        self._queue = Gauge("worldvln_queue_length", "Requests that wait.", registry=registry)
        self._ready = Gauge("worldvln_ready", "1 when sessions can be started.", registry=registry)
        memory = Gauge("worldvln_resident_memory_bytes", "Resident memory of the server.", registry=registry)
        memory.set_function(lambda: resident_bytes("VmRSS") or 0)
        self._stages = Histogram(
            "worldvln_request_stage_seconds",
            "Stages of answered observations: queue, decode, infer and total.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        for stage in StageTimes.__struct_fields__:
            self._stages.labels(stage)
        self._segment_seconds = Histogram(
            "worldvln_segment_seconds", "Emitted segments, on the device.", buckets=_SECONDS, registry=registry
        )
        self._model_stages = Histogram(
            "worldvln_model_stage_seconds",
            "Stages of the model within an emitted segment.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._segments = Counter(
            "worldvln_segments",
            "Emitted segments by flown profile and action head.",
            ("profile", "head"),
            registry=registry,
        )
        self._late = Counter("worldvln_late_answers", "Answers after their deadline.", registry=registry)
        self._holds = Counter("worldvln_holds", "Answers replaced by zero motion.", ("reason",), registry=registry)
        self._refusals = Counter("worldvln_refusals", "Refused requests by error code.", ("code",), registry=registry)
        for code in ERRORS:
            self._refusals.labels(code)
        self._cut_off = Counter(
            "worldvln_clients_cut_off", "Clients given up because they did not read.", ("door",), registry=registry
        )

    def watch(self, *, sessions: Callable[[], int], queue: Callable[[], int], is_ready: Callable[[], bool]) -> None:
        """Ask these whenever somebody reads the metrics: open sessions, waiting requests, can sessions be started."""
        self._sessions.set_function(sessions)
        self._queue.set_function(queue)
        self._ready.set_function(is_ready)

    def watch_recorder(self, recorder: RecorderState) -> None:
        """Ask the recorder, too, whenever somebody reads the metrics."""
        registry = self._registry
        Gauge(
            "worldvln_recording",
            "1 while flights are recorded, 0 once that has stopped (see the log).",
            registry=registry,
        ).set_function(lambda: recorder.is_recording)
        Gauge("worldvln_recorded_bytes", "Written to recordings since the start.", registry=registry).set_function(
            lambda: recorder.written_bytes
        )
        Gauge(
            "worldvln_recorder_lost_frames", "Frames that came faster than they could be written.", registry=registry
        ).set_function(lambda: recorder.lost_frames)
        Gauge("worldvln_recorder_lost_events", "The same, of events of any kind.", registry=registry).set_function(
            lambda: recorder.lost_events
        )

    def segment(self, chunk: ActionChunk, seconds: float) -> None:
        """See `Meter.segment`."""
        self._segments.labels(chunk.profile, chunk.head).inc()
        self._segment_seconds.observe(seconds)
        for stage, spent_ms in chunk.timings_ms.items():
            self._model_stages.labels(stage).observe(spent_ms / 1e3)

    def answered(self, times: StageTimes, *, is_late: bool = False, hold: str | None = None) -> None:
        """See `Meter.answered`."""
        for stage in StageTimes.__struct_fields__:
            self._stages.labels(stage).observe(getattr(times, stage) / 1e3)
        if is_late:
            self._late.inc()
        if hold is not None:
            self._holds.labels(hold).inc()

    def refused(self, code: str) -> None:
        """See `Meter.refused`."""
        self._refusals.labels(code).inc()

    def cut_off(self, door: str) -> None:
        """See `Meter.cut_off`."""
        self._cut_off.labels(door).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """(text, content type) for an Accept header: Prometheus text, or OpenMetrics where that is asked for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


_INFO_LABELS = ("version", "model", "precision", "backend", "device")
