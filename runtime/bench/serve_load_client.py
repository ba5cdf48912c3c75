"""The clients of `bench-serve`, in a process of their own: sessions that fly as fast as they are answered.

Each client has one session at a time and one request on the way: 16 JPEG frames, then the next 16 as soon as the
actions are there. Every request is waited for, also behind the end of the measurement, so what is lost is counted.
Source: spec/session_protocol.md 7.3.
"""

from __future__ import annotations

import asyncio
import io
import sys
import time

import msgspec
import numpy as np
from PIL import Image

from worldvln_edge.async_client import AnswerTimeoutError, AsyncSessionClient, ServerError, ServerUnreachableError

FRAMES_PER_REQUEST = 16
_HORIZONS = 8
"""Of a session; then it is ended, and the next one started."""
_JPEG_QUALITY = 90


class LoadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told."""

    url: str
    sessions: int
    seconds: float
    warm_up_s: float
    """Flown before, and not measured."""
    frame_hw: tuple[int, int] = (256, 256)
    answer_timeout_s: float = 60.0


class LoadResult(msgspec.Struct, kw_only=True):
    """What it found. Lists have one entry for each answered request of 16 frames, in milliseconds."""

    connected_s: float = 0.0
    """When all were connected, on the machine's monotonic clock."""
    seconds: float = 0.0
    """From the end of the warm-up to the last answer."""
    total_ms: list[float] = []
    """As the client sees it: from the call to the answer."""
    decode_ms: list[float] = []
    infer_ms: list[float] = []
    queue_ms: list[float] = []
    """These three as the server says."""
    lost: int = 0
    """Requests without an answer, and answers without the actions that were due; warm-up included."""
    refused: dict[str, int] = {}
    """Error code -> answers with it; warm-up included."""


def jpeg_frames(frame_hw: tuple[int, int], count: int = FRAMES_PER_REQUEST, seed: int = 0) -> list[bytes]:
    """Pictures with large shapes and little noise, of about 0.2 bytes a pixel, as a camera gives."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    picture = np.asarray(shapes.resize(frame_hw[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
    picture = np.clip(picture + rng.integers(-4, 5, picture.shape), 0, 255).astype(np.uint8)
    frames = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(np.roll(picture, 3 * index, axis=1)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        frames.append(buffer.getvalue())
    return frames


class LoadClients:
    """All clients of one measurement, on one event loop."""

    def __init__(self, config: LoadConfig):
        self._config = config
        self._frames = jpeg_frames(config.frame_hw)
        self._result = LoadResult()
        self._connected, self._go = 0, asyncio.Event()
        self._begin_s = self._end_s = float("inf")

    async def run(self) -> LoadResult:
        """Connect all, fly the warm-up, then measure.

        Raises:
            ServerUnreachableError: nobody answers at the address.
        """
        tasks = [asyncio.create_task(self._client(number)) for number in range(self._config.sessions)]
        try:
            while self._connected < len(tasks):
                for task in tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)
            self._result.connected_s = time.monotonic()
            self._begin_s = time.perf_counter() + self._config.warm_up_s
            self._end_s = self._begin_s + self._config.seconds
            self._go.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return self._result

    async def _client(self, number: int) -> None:
        async with AsyncSessionClient(
            self._config.url,
            connect_timeout_s=60.0,
            answer_timeout_s=self._config.answer_timeout_s,
            reconnect_s=0.0,
        ) as client:
            self._connected += 1
            await self._go.wait()
            while time.perf_counter() < self._end_s:
                try:
                    await self._fly(client, number)
                except (AnswerTimeoutError, ServerUnreachableError):
                    self._result.lost += 1
                except ServerError as error:
                    self._result.refused[error.code] = self._result.refused.get(error.code, 0) + 1
                    await asyncio.sleep((error.retry_ms or 100) / 1e3)

    async def _fly(self, client: AsyncSessionClient, number: int) -> None:
        await client.start("move forward 5 meters", seed=number, chain=True, max_horizons=_HORIZONS)
        await client.observe(self._frames[:1])
        is_done = False
        while not is_done and time.perf_counter() < self._end_s:
            sent_s = time.perf_counter()
            answer = await client.observe(self._frames)
            now_s = time.perf_counter()
            is_done = answer.done
            if answer.segment < 0:
                self._result.lost += 1
            if sent_s >= self._begin_s:
                self._result.total_ms.append((now_s - sent_s) * 1e3)
                self._result.decode_ms.append(answer.server_ms.decode)
                self._result.infer_ms.append(answer.server_ms.infer)
                self._result.queue_ms.append(answer.server_ms.queue)
                self._result.seconds = now_s - self._begin_s
        await client.end()


def main() -> None:
    """The process: `python -m worldvln_edge.runtime.bench.serve_load_client CONFIG`, a LoadConfig as JSON."""
    config = msgspec.json.decode(sys.argv[1], type=LoadConfig)
    result = asyncio.run(LoadClients(config).run())
    sys.stdout.buffer.write(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
