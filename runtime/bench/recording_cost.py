"""What recording costs a flight: the same flights with and without a recorder, side by side.

A flight goes through a session manager, one JPEG frame a request, as fast as answers come: decoding, inference and the
recorder's thread share the processor. Flights alternate, and every pair begins with the other kind. What is compared
is the wall time of a segment, and the processor time of the whole process, which other programs do not stretch.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from worldvln_edge.protocol import Observe, Start
from worldvln_edge.runtime.bench.serve_load_client import jpeg_frames
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.recording.recorded_policy import settings_of
from worldvln_edge.runtime.recording.recorder import Recorder, RecorderConfig
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy


@dataclass(frozen=True, kw_only=True)
class RecordingCostConfig:
    pairs: int = 20
    """Of flights, one recorded and one not."""
    frame_hw: tuple[int, int] = (480, 640)
    """Of the camera."""
    threads: int = 0
    backend: BackendName = "cpu"


class RecordingCost(msgspec.Struct, kw_only=True):
    """Milliseconds of a segment, one number a flight; the same place in both lists is a pair."""

    wall_ms: list[float] = []
    recorded_wall_ms: list[float] = []
    cpu_ms: list[float] = []
    recorded_cpu_ms: list[float] = []
    bytes_per_segment: float = 0.0
    lost_frames: int = 0

    @property
    def wall_share(self) -> float:
        """What recording adds to the wall time of a segment: the median over pairs; 0.01 is 1 %."""
        return _added(self.wall_ms, self.recorded_wall_ms)

    @property
    def cpu_share(self) -> float:
        """The same of processor time, the recorder's thread included."""
        return _added(self.cpu_ms, self.recorded_cpu_ms)


def measure_recording(
    bundle: Path, config: RecordingCostConfig, on_flight: Callable[[], object] = lambda: None
) -> RecordingCost:
    """Fly, and count.

    Args:
        bundle: what flies.
        config: how much.
        on_flight: called after every flight.

    Raises:
        Everything that `load_policy` raises.
    """
    policy = load_policy(bundle, backend=config.backend, threads=config.threads)
    folder = Path(tempfile.mkdtemp(prefix="recording-cost-"))
    try:
        return asyncio.run(_measure(policy, folder, config, on_flight))
    finally:
        shutil.rmtree(folder)
        policy.close()


async def _measure(
    policy: WorldVLNPolicy, folder: Path, config: RecordingCostConfig, on_flight: Callable[[], object]
) -> RecordingCost:
    cost, frames = RecordingCost(), jpeg_frames(config.frame_hw, policy.info.horizon.points[-2])
    recorder = Recorder(
        folder, policy.info, settings_of(policy, threads=config.threads), config=RecorderConfig(least_free_bytes=0)
    )
    try:
        for warm_up in (True, False):
            for pair in range(1 if warm_up else config.pairs):
                for is_recorded in (pair % 2 == 0, pair % 2 == 1):
                    wall_ms, cpu_ms = await _fly(policy, frames, recorder if is_recorded else None)
                    if warm_up:
                        continue
                    (cost.recorded_wall_ms if is_recorded else cost.wall_ms).append(wall_ms)
                    (cost.recorded_cpu_ms if is_recorded else cost.cpu_ms).append(cpu_ms)
                    on_flight()
    finally:
        recorder.close()
    flights = config.pairs + 1
    cost.bytes_per_segment = recorder.written_bytes / (flights * policy.info.horizon.segments)
    cost.lost_frames = recorder.lost_frames
    return cost


async def _fly(policy: WorldVLNPolicy, frames: list[bytes], recorder: Recorder | None) -> tuple[float, float]:
    """Wall and processor milliseconds of a segment in one flight; what waits to be written is in it."""
    manager = SessionManager(policy)
    if recorder is not None:
        manager.events.subscribe(recorder.watch)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await manager.start("", Start(id=1, session="bench", prompt="move forward 5 meters"))
    for index, frame in enumerate(frames, start=1):
        await manager.observe("", Observe(id=index, session="bench", first=index, frames=[frame]))
    await manager.end("", "bench", 0)
    wall_s = time.perf_counter() - wall_s
    manager.close()
    if recorder is not None:
        await asyncio.to_thread(recorder.wait_until_written)
    cpu_s = time.process_time() - cpu_s
    segments = policy.info.horizon.segments
    return wall_s * 1e3 / segments, cpu_s * 1e3 / segments


def _added(plain: list[float], recorded: list[float]) -> float:
    return median(with_ / without - 1 for without, with_ in zip(plain, recorded, strict=True))
