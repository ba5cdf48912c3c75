"""A server in a process of its own, flown for long by clients that come and go: does its memory grow?

Drones send 16 frames a second over WebSocket and ZeroMQ. Sessions are finished, ended early, left to expire, or asked
for after they have expired; connections are closed in the middle of a flight, and the session is resumed. The policy
computes nothing, so what grows is the server's. Memory and processor time are those of the server's process.
Source: spec/session_protocol.md 7.3, 7.4.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.async_client import AnswerTimeoutError, AsyncSessionClient, ServerError, ServerUnreachableError
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.bench.null_server import NullServerConfig, NullServerProcess
from worldvln_edge.runtime.bench.report_table import Part
from worldvln_edge.runtime.bench.serve_load_client import FRAMES_PER_REQUEST, jpeg_frames
from worldvln_edge.runtime.bench.soak_log import SegmentSample, SoakLog
from worldvln_edge.runtime.bench.soak_report import SoakReport, soak_parts, summarise
from worldvln_edge.runtime.sessions.null_policy import NullPolicy


@dataclass(frozen=True, kw_only=True)
class ServerSoakConfig:
    minutes: float = 30.0  # measured
    warm_up_minutes: float = 3.0  # flown before: they allocate memory
    drones: int = 12  # that fly at once
    period_s: float = 1.0  # between two requests of a drone
    session_ttl_s: float = 5.0  # of the server: short, so that many sessions expire
    frame_hw: tuple[int, int] = (256, 256)
    seed: int = 0  # of who does what

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf or not 0 <= self.warm_up_minutes < math.inf:
            raise ValueError("minutes must be above 0, and warm_up_minutes at least 0")
        if self.drones < 1 or self.period_s <= 0 or self.session_ttl_s <= 0:
            raise ValueError("drones must be at least 1, period_s and session_ttl_s above 0")


class Events(msgspec.Struct, kw_only=True):
    """What the drones did, warm-up included."""

    started: int = 0
    ended: int = 0
    left: int = 0
    """Sessions that nobody ended."""
    expired: int = 0
    """Of them, those that were asked for afterwards and were gone, as they should be."""
    resumed: int = 0
    """Flights that went on after their connection was closed."""


_WARM = 5
"""Sessions of each kind that a warm-up has to hold: the first ones allocate what the others use again."""


class ServerSoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge soak --server` prints."""

    server: SoakReport
    drones: int
    events: Events
    warm_up: Events
    """Of them, those before the first measured segment."""
    lost: list[str]
    """Requests that were not answered as they should be, in words."""
    exit_status: int
    """Of the server, after SIGTERM."""

    @property
    def faults(self) -> list[str]:
        """Why the soak failed; empty when it passed."""
        found = self.server.faults
        rare = [name for name in self.warm_up.__struct_fields__ if getattr(self.warm_up, name) < _WARM]
        if rare:
            found.append(
                f"the warm-up was too short for a baseline: fewer than {_WARM} sessions were {' or '.join(rare)}; give "
                "more --warm-up-minutes"
            )
        if self.lost:
            found.append(f"{len(self.lost)} requests were not answered as they should be, first: {self.lost[0]}")
        if self.exit_status:
            found.append(f"the server ended with status {self.exit_status}")
        return found


def soak_server(
    config: ServerSoakConfig | None = None, *, on_segment: Callable[[float], None] = lambda elapsed_s: None
) -> ServerSoakReport:
    """Start a server and fly it for long.

    Args:
        on_segment: called after every segment, the warm-up included, with the seconds since the start.

    Raises:
        NullServerError: the server did not start, or this system is not Linux.
        SoakError: too few segments.
    """
    config = config or ServerSoakConfig()
    with tempfile.TemporaryDirectory(prefix="worldvln-") as folder:
        endpoints = (f"ipc://{Path(folder) / 'soak'}", "tcp://127.0.0.1:*")
        limits = Limits(session_ttl_s=config.session_ttl_s)
        with NullServerProcess(NullServerConfig(limits=limits, zmq_endpoints=endpoints)) as server:
            drones = SoakDrones(server, config, on_segment)
            asyncio.run(drones.fly())
            exit_status = server.stop()
    return ServerSoakReport(
        server=summarise(NullPolicy().info, drones.log, threads=0),
        drones=config.drones,
        events=drones.events,
        warm_up=drones.warm_up,
        lost=drones.lost,
        exit_status=exit_status,
    )


def server_soak_parts(report: ServerSoakReport) -> list[Part]:
    """The report as sentences and a table."""
    did = report.events
    story = (
        f"{report.drones} drones over WebSocket, ZeroMQ ipc and ZeroMQ tcp, {FRAMES_PER_REQUEST} JPEG frames a "
        f"request; {did.started:,} sessions started ({report.warm_up.started:,} of them in the warm-up), "
        f"{did.ended:,} ended, {did.left:,} left to expire ({did.expired:,} of them "
        f"asked for afterwards), {did.resumed:,} resumed after a closed connection; {len(report.lost)} requests lost"
    )
    return [story, *soak_parts(report.server)[1:]]


class SoakDrones:
    """All clients of a soak, on one event loop, and what they saw."""

    def __init__(self, server: NullServerProcess, config: ServerSoakConfig, on_segment: Callable[[float], None]):
        self._server, self._config, self._on_segment = server, config, on_segment
        self._frames = jpeg_frames(config.frame_hw, seed=config.seed)
        self.log = SoakLog(config.drones * (math.ceil(config.minutes * 60 / config.period_s) + 2))
        self.events, self.warm_up = Events(), Events()
        self.lost: list[str] = []
        self._start_s = self._processor_s = 0.0

    async def fly(self) -> None:
        """Warm-up and measured time. Whatever goes wrong with a request stands in `lost`."""
        self._start_s, self._processor_s = time.perf_counter(), self._server.processor_s()
        urls = (self._server.url, *self._server.zmq_urls)
        await asyncio.gather(*(self._drone(number, urls[number % len(urls)]) for number in range(self._config.drones)))

    @property
    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def _is_over(self) -> bool:
        return self._elapsed_s >= (self._config.warm_up_minutes + self._config.minutes) * 60

    async def _drone(self, number: int, url: str) -> None:
        rng = random.Random(self._config.seed * 10_000 + number)
        await asyncio.sleep(rng.random() * self._config.period_s)  # drones are not in step
        async with AsyncSessionClient(url, answer_timeout_s=60.0) as client:
            while not self._is_over:
                try:
                    await self._session(client, rng)
                except (AnswerTimeoutError, ServerError, ServerUnreachableError) as error:
                    self.lost.append(f"{url} after {self._elapsed_s:.0f} s: {error}")
                    await asyncio.sleep(self._config.period_s)

    async def _session(self, client: AsyncSessionClient, rng: random.Random) -> None:
        await client.start(f"prompt {rng.random()}", seed=rng.randrange(1000), chain=True, max_horizons=3)
        self.events.started += 1
        await client.observe(self._frames[:1])
        is_done, requests = False, rng.randint(1, 10)
        while not is_done and requests and not self._is_over:
            if rng.random() < 0.1:
                await client.close()  # the next request opens it again, and resumes
                self.events.resumed += 1
            is_done = await self._segment(client)
            requests -= 1
        end = rng.random()
        if end < 0.6 or self._is_over:
            await client.end()
            self.events.ended += 1
            return
        self.events.left += 1
        if end > 0.8:
            await self._ask_for_what_expired(client)

    async def _segment(self, client: AsyncSessionClient) -> bool:
        """Fly one segment, and wait for the next one to be due. Returns whether it was the last one."""
        start_s = time.perf_counter()
        answer = await client.observe(self._frames)
        wall_s = time.perf_counter() - start_s
        if answer.segment < 0:
            self.lost.append(f"no actions at frame {answer.frames}, although they were due")
        processor_s = self._server.processor_s()
        took_s, self._processor_s = processor_s - self._processor_s, processor_s
        if self._elapsed_s >= self._config.warm_up_minutes * 60 and not self._is_over:
            if not len(self.log):
                self.warm_up = msgspec.structs.replace(self.events)
            self.log.add(
                SegmentSample(
                    kind="segment",
                    elapsed_s=self._elapsed_s,
                    wall_ms=wall_s * 1e3,
                    processor_ms=took_s * 1e3,  # since the answer before, whoever's it was
                    rss_bytes=self._server.resident_bytes(),
                    sessions=self.events.started,
                )
            )
        self._on_segment(self._elapsed_s)
        await asyncio.sleep(max(0.0, self._config.period_s - wall_s))
        return answer.done

    async def _ask_for_what_expired(self, client: AsyncSessionClient) -> None:
        """A server looks for expired sessions at least as often as they expire."""
        await asyncio.sleep(2.5 * self._config.session_ttl_s)
        try:
            await client.observe([])
        except ServerError as error:
            if error.code != "unknown_session":
                raise
            self.events.expired += 1
        else:
            self.lost.append(f"a session was there {2.5 * self._config.session_ttl_s:g} s after its last request")
