"""A long flight of many sessions in one process: does memory grow, does a segment get slower?

Sessions come and go as on a server: several live at once, prompts repeat or do not, every profile is flown, frames come
whole or in parts, work ahead is done or left out, prompts change on the way, and flights are finished, ended early or
dropped. The text cache is cut to a few prompts, so that it is full after the warm-up; on a server it grows to its own
limit first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worldvln_edge.runtime.bench.bench_flight import synthetic_frames
from worldvln_edge.runtime.bench.soak_log import SegmentSample, SoakLog
from worldvln_edge.runtime.bench.soak_report import SoakError, SoakReport, summarise
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.sessions.process_memory import resident_bytes
from worldvln_edge.runtime.worldvln.text_cache import TextCache
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy
from worldvln_edge.runtime.worldvln.worldvln_session import WorldVLNSession

_REPEATED_PROMPTS = ("move forward 5 meters", "turn left", "climb and fly to the red tower")
_NEW_PROMPT_WORDS = ("move", "forward", "back", "turn", "left", "right", "climb", "meters", "degrees", "tower", "and")


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    segments: int = 1000  # timed
    warm_up_segments: int = 200  # flown before: they allocate memory and fill caches
    sessions_at_once: int = 4
    text_cache_prompts: int = 4  # of the longest kind
    frame_hw: tuple[int, int] = (480, 640)  # of the camera, before the policy scales it
    backend: BackendName = "cpu"  # what runs the graphs, see backends.open_engines
    threads: int = 0  # CPU threads per engine call; 0: all cores
    seed: int = 0  # of frames, prompts, and of who flies when

    def __post_init__(self) -> None:
        if self.segments < 1 or self.warm_up_segments < 0:
            raise ValueError("segments must be at least 1, and warm_up_segments at least 0")
        if self.sessions_at_once < 1 or self.text_cache_prompts < 0:
            raise ValueError("sessions_at_once must be at least 1, and text_cache_prompts at least 0")


def soak_bundle(
    bundle_folder: Path, config: SoakConfig | None = None, *, on_segment: Callable[[], None] = lambda: None
) -> SoakReport:
    """Load a bundle and fly it for long.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        on_segment: called after every segment, the warm-up included.

    Raises:
        BundleError: missing or corrupt bundle.
        BackendError, EngineError: the backend cannot fly the bundle here, or a graph does not load.
        NonFiniteActionsError: the model gave NaN.
        SoakError: the system does not tell the process's memory.
    """
    config = config or SoakConfig()
    log = SoakLog(config.segments)
    with closing(load_policy(bundle_folder, backend=config.backend, threads=config.threads)) as policy:
        for number, sample in enumerate(SoakFlights(policy, config).fly()):
            if number >= config.warm_up_segments:
                log.add(sample)
            on_segment()
        return summarise(policy.info, log, threads=config.threads)


@dataclass(eq=False, kw_only=True)
class _Flight:
    session: WorldVLNSession
    last_segment: int
    """It ends here, early or not."""
    prompt_change_at: int | None
    is_prepared: bool = False
    """Work ahead was done for the next segment."""


class SoakFlights:
    """The flights of a soak, one segment at a time."""

    def __init__(self, policy: WorldVLNPolicy, config: SoakConfig):
        self._policy, self._config = policy, config
        self._points = policy.info.horizon.points
        self._frames = synthetic_frames(config.frame_hw, self._points[-2], config.seed)
        self._random = random.Random(config.seed)
        self._flights: list[_Flight] = []
        self._started = 0

    def fly(self) -> Iterator[SegmentSample]:
        """Warm-up and timed segments, in the order in which they were flown.

        Raises:
            SoakError, NonFiniteActionsError: see `soak_bundle`.
        """
        self._limit_text_cache()
        start = time.perf_counter()
        for _ in range(self._config.warm_up_segments + self._config.segments):
            while len(self._flights) < self._config.sessions_at_once:
                self._flights.append(self._start())
            flight = self._random.choice(self._flights)
            kind, wall_s, processor_s = self._advance(flight)
            if flight.session.done or flight.session.emitted >= flight.last_segment:
                self._flights.remove(flight)
                if self._random.random() < 0.75:
                    flight.session.close()  # the others are dropped, as when their client is gone
            del flight  # or it would live until the next turn
            yield SegmentSample(
                kind=kind,
                elapsed_s=time.perf_counter() - start,
                wall_ms=wall_s * 1e3,
                processor_ms=processor_s * 1e3,
                rss_bytes=_resident_bytes(),
                sessions=self._started,
            )

    def _limit_text_cache(self) -> None:
        """Room for a few of the longest prompts."""
        prompt = " ".join(_NEW_PROMPT_WORDS * 100)  # cut to the longest that the model takes
        session = self._policy.new_session(prompt)
        session.work_ahead()
        self._policy.texts = TextCache(self._config.text_cache_prompts * session.kv_bytes)

    def _start(self) -> _Flight:
        number, last = self._started, len(self._points) - 2
        self._started += 1
        session = self._policy.new_session(
            self._prompt(), seed=number, emit="ahead" if self._random.random() < 0.75 else "behind"
        )
        profiles = list(self._policy.profiles.values())
        session.profile = profiles[number % len(profiles)]
        flight = _Flight(
            session=session,
            last_segment=self._random.randint(0, last) if self._random.random() < 0.3 else last,
            prompt_change_at=self._random.randint(1, last) if last and self._random.random() < 0.2 else None,
        )
        self._work_ahead(flight)
        return flight

    def _prompt(self) -> str:
        if self._random.random() < 0.5:
            return self._random.choice(_REPEATED_PROMPTS)
        words = self._random.choices(_NEW_PROMPT_WORDS, k=self._random.randint(1, 12))
        return f"{' '.join(words)} {self._started}"

    def _work_ahead(self, flight: _Flight) -> None:
        flight.is_prepared = self._random.random() < 0.75  # a busy server leaves it out
        if flight.is_prepared:
            flight.session.work_ahead()

    def _advance(self, flight: _Flight) -> tuple[str, float, float]:
        """Fly one segment. Returns (what kind of segment it was, its seconds, its processor time in seconds)."""
        session, segment = flight.session, flight.session.emitted + 1
        changes_prompt = segment == flight.prompt_change_at
        if changes_prompt:
            session.set_prompt(self._prompt())
        comes_in_parts = session.need > 1 and self._random.random() < 0.5
        if comes_in_parts:
            session.observe(self._next_frames(session, session.need // 2))
        misses = self._policy.texts.misses
        frames = self._next_frames(session, session.need)
        processor_start, start = time.process_time(), time.perf_counter()
        chunk = session.observe(frames)
        wall_s, processor_s = time.perf_counter() - start, time.process_time() - processor_start
        if chunk is None:
            raise RuntimeError(f"no actions at frame {session.frames}, although segment {segment} starts there")
        is_new_text = self._policy.texts.misses > misses
        kind = (session.profile.name, segment, comes_in_parts, flight.is_prepared, changes_prompt, is_new_text)
        self._work_ahead(flight)
        return "/".join(map(str, kind)), wall_s, processor_s

    def _next_frames(self, session: WorldVLNSession, count: int) -> list[np.ndarray]:
        """The frames that follow; those of the last segment, which no policy looks at, repeat the last one."""
        wanted = range(session.frames, session.frames + count)
        return [self._frames[min(index, len(self._frames) - 1)] for index in wanted]


def _resident_bytes() -> int:
    found = resident_bytes("VmRSS")
    if found is None:
        raise SoakError("this system does not tell a process's resident memory; run the soak on Linux")
    return found
