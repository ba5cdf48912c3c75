"""OpenTelemetry spans of answered observations."""

import asyncio
import sys

import numpy as np
import pytest
from http_calls import HttpCalls, frame
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import StageTimes
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.tracing import SpanMeter, TracingUnavailableError, open_tracing

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)


class Traces:
    """Spans of one meter, kept in memory."""

    def __init__(self, **options):
        self._kept = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource({}), shutdown_on_exit=False, **options)
        provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.meter = SpanMeter(provider)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._kept.get_finished_spans()

    @property
    def requests(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.parent is None]

    def children(self, parent: ReadableSpan) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.spans if span.parent and span.parent.span_id == parent.context.span_id}


def chunk(segment: int = 0, **timings_ms: float) -> ActionChunk:
    return ActionChunk(
        segment=segment, actions=np.zeros((16, 6), np.float32), observed_frames=1, seed=0, timings_ms=timings_ms
    )


def milliseconds(span: ReadableSpan) -> float:
    return (span.end_time - span.start_time) / 1e6


def test_every_answered_observation_is_a_span_with_its_stages():
    traces = Traces()
    with (
        BackgroundServer(NullPolicy(infer_s=0.02), meters=[traces.meter]) as server,
        SessionClient(server.url) as client,
    ):
        client.start("go", session="flight-of-mine")
        answers = [client.observe([FRAME] * count) for count in (1, 5, 11)]
    assert [span.attributes.get("worldvln.segment") for span in traces.requests] == [0, None, 1]
    for span, answer in zip(traces.requests, answers, strict=True):
        assert (span.name, span.kind) == ("worldvln.observe", SpanKind.SERVER)
        assert milliseconds(span) == pytest.approx(answer.server_ms.total, abs=1e-3)
        stages = traces.children(span)
        assert list(stages) == ["queue", "decode", "infer"]
        for name, stage in stages.items():
            assert milliseconds(stage) == pytest.approx(getattr(answer.server_ms, name), abs=1e-3)
            assert span.start_time <= stage.start_time
        assert stages["queue"].end_time == stages["decode"].start_time
        assert stages["decode"].end_time == stages["infer"].start_time
    assert milliseconds(traces.children(traces.requests[0])["infer"]) >= 20
    assert traces.requests[0].attributes["worldvln.profile"] == "exact"
    assert traces.requests[0].attributes["worldvln.head"] == "latent"
    text = " ".join(span.to_json() for span in traces.spans)
    assert "flight-of-mine" not in text
    assert '"go"' not in text


def test_http_calls_are_spans_too():
    traces = Traces()
    with BackgroundServer(NullPolicy(), meters=[traces.meter]) as server, HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go", allow_future_segments=True)
    assert [span.attributes["worldvln.segment"] for span in traces.requests] == [0]


def test_stages_of_the_model_stand_under_infer_one_after_the_other():
    traces = Traces()
    traces.meter.segment(chunk(vae_encoder=3.0, world_model_step=5.0), 0.009)
    traces.meter.answered(StageTimes(queue=1.0, decode=2.0, infer=9.0, total=12.5))
    infer = traces.children(traces.requests[0])["infer"]
    stages = traces.children(infer)
    assert {name: milliseconds(span) for name, span in stages.items()} == {"vae_encoder": 3.0, "world_model_step": 5.0}
    assert infer.start_time == stages["vae_encoder"].start_time
    assert stages["vae_encoder"].end_time == stages["world_model_step"].start_time
    assert stages["world_model_step"].end_time <= infer.end_time
    assert len({span.context.trace_id for span in traces.spans}) == 1


def test_refused_observation_leaves_its_segment_to_nobody():
    traces = Traces()
    times = StageTimes(queue=0.0, decode=0.0, infer=0.0, total=0.0)
    traces.meter.segment(chunk(segment=2), 0.1)
    traces.meter.refused("cancelled")
    traces.meter.answered(times)
    traces.meter.segment(chunk(segment=1), 0.1)
    traces.meter.answered(times)
    traces.meter.answered(times)
    traces.meter.cut_off("zmq")
    assert [span.attributes.get("worldvln.segment") for span in traces.requests] == [None, 1, None]


def test_requests_beside_each_other_keep_their_own_segments():
    traces = Traces()

    async def request(segment: int) -> None:
        traces.meter.segment(chunk(segment), 0.1)
        await asyncio.sleep(0.01 * (3 - segment))
        traces.meter.answered(StageTimes(queue=0.0, decode=0.0, infer=float(segment), total=9.0))

    async def all_at_once() -> None:
        await asyncio.gather(*(request(segment) for segment in range(3)))

    asyncio.run(all_at_once())
    for span in traces.requests:
        assert milliseconds(traces.children(span)["infer"]) == span.attributes["worldvln.segment"]
    assert [span.attributes["worldvln.segment"] for span in traces.requests] == [2, 1, 0]


def test_late_and_held_answers_are_marked():
    traces = Traces()
    policy, envelope = NullPolicy(infer_s=0.2), EnvelopeConfig()
    with (
        BackgroundServer(policy, envelope=envelope, meters=[traces.meter]) as server,
        SessionClient(server.url) as client,
    ):
        client.start("go")
        assert client.observe([FRAME], deadline_ms=150).hold == "late"
    assert traces.requests[0].attributes["worldvln.late"] is True
    assert traces.requests[0].attributes["worldvln.hold"] == "late"


def test_refused_requests_are_no_spans():
    traces = Traces()
    with BackgroundServer(NullPolicy(), meters=[traces.meter]) as server, SessionClient(server.url) as client:
        client.start("go")
        with pytest.raises(ServerError, match="gap"):
            client.observe([FRAME], first=5)
    assert traces.spans == ()


def test_sampler_of_the_operator_decides():
    traces = Traces(sampler=ALWAYS_OFF)
    traces.meter.segment(chunk(vae_encoder=1.0), 0.1)
    traces.meter.answered(StageTimes(queue=0.0, decode=0.0, infer=1.0, total=1.0))
    assert traces.spans == ()


@pytest.mark.parametrize(
    "missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"]
)
def test_missing_package_names_the_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TracingUnavailableError, match=rf"{missing} is missing.*worldvln-edge\[otel\]"), open_tracing():
        pass
