"""A `Meter` that makes OpenTelemetry spans: one for every answered observation, with its stages as children.

    worldvln.observe
      queue, decode, infer       of the request; drawn in this order, although it may wait before and after decode
        vae_encoder, ...         under infer: the model's own stages, where the observation emitted a segment

Where spans go is OpenTelemetry's business: its exporter, sampler and resource read the standard OTEL_* environment.
Needs the extra `otel`; nothing of it is imported before it is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from worldvln_edge import __version__
from worldvln_edge.protocol import StageTimes
from worldvln_edge.runtime.sessions.policy import ActionChunk

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_SERVICE = "worldvln-edge"
_Attributes = dict[str, str | int | bool]


class TracingUnavailableError(RuntimeError):
    """OpenTelemetry is not installed."""

    def __init__(self, missing: str | None):
        super().__init__(
            f"traces need OpenTelemetry ({missing} is missing); install it with: pip install 'worldvln-edge[otel]', or "
            "leave --otel out"
        )


class SpanMeter:
    """Spans name no session and hold no prompt, as the log does.

    Args:
        provider: makes the tracer; shutting it down is its owner's business.
    """

    def __init__(self, provider: TracerProvider):
        from opentelemetry import context, trace

        self._trace, self._nowhere = trace, context.Context()
        self._tracer = provider.get_tracer(_SERVICE, __version__)
        # A request's segment is reported in the context in which it is answered, and requests run beside each other.
        self._emitted: ContextVar[ActionChunk | None] = ContextVar("emitted", default=None)

    def segment(self, chunk: ActionChunk, seconds: float) -> None:
        """See `Meter.segment`."""
        self._emitted.set(chunk)

    def answered(self, times: StageTimes, *, is_late: bool = False, hold: str | None = None) -> None:
        """See `Meter.answered`."""
        chunk = self._emitted.get()
        self._emitted.set(None)
        attributes: _Attributes = {"worldvln.late": is_late}
        if chunk is not None:
            attributes["worldvln.segment"] = chunk.segment
            attributes["worldvln.profile"] = chunk.profile
            attributes["worldvln.head"] = chunk.head
        if hold is not None:
            attributes["worldvln.hold"] = hold
        begun_ns = time.time_ns() - _nanoseconds(times.total)
        request = self._span("worldvln.observe", None, begun_ns, times.total, attributes)
        for stage in ("queue", "decode", "infer"):
            spent_ms = getattr(times, stage)
            span = self._span(stage, request, begun_ns, spent_ms)
            if stage == "infer" and chunk is not None:
                self._model_stages(span, begun_ns, chunk)
            begun_ns += _nanoseconds(spent_ms)

    def refused(self, code: str) -> None:
        """See `Meter.refused`."""
        self._emitted.set(None)

    def cut_off(self, door: str) -> None:
        """See `Meter.cut_off`."""

    def _model_stages(self, infer: Span, begun_ns: int, chunk: ActionChunk) -> None:
        for stage, spent_ms in chunk.timings_ms.items():
            self._span(stage, infer, begun_ns, spent_ms)
            begun_ns += _nanoseconds(spent_ms)

    def _span(
        self, name: str, parent: Span | None, begun_ns: int, spent_ms: float, attributes: _Attributes | None = None
    ) -> Span:
        """A span of the past, ended; its children may follow all the same."""
        kinds = self._trace.SpanKind
        span = self._tracer.start_span(
            name,
            self._nowhere if parent is None else self._trace.set_span_in_context(parent, self._nowhere),
            kinds.SERVER if parent is None else kinds.INTERNAL,
            attributes,
            start_time=begun_ns,
        )
        span.end(begun_ns + _nanoseconds(spent_ms))
        return span


@contextmanager
def open_tracing() -> Iterator[SpanMeter]:
    """Spans on their way to the collector that the OTEL_* environment names; the last ones go out at the end.

    Raises:
        TracingUnavailableError: the packages of the extra `otel` are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise TracingUnavailableError(error.name) from error
    named = Resource({"service.name": _SERVICE, "service.version": __version__})
    resource = Resource.create().merge(named).merge(OTELResourceDetector().detect())  # the operator's names win
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield SpanMeter(provider)
    finally:
        provider.shutdown()


def _nanoseconds(ms: float) -> int:
    return round(ms * 1e6)
