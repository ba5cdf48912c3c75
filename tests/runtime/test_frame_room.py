"""However many requests bring frames at once, those that wait for the policy stay within `max_stored_bytes`."""

import asyncio
import threading
from dataclasses import dataclass

import numpy as np

from worldvln_edge.protocol import Limits, Observe, ProtocolError, Start
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.implicit_session import ImplicitCall, Wording
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_events import SentFrame
from worldvln_edge.runtime.sessions.session_manager import SessionManager

SIDE, FRAMES, SESSIONS, FITTING = 16, 4, 10, 3
FRAME_BYTES = SIDE * SIDE * 3
LIMITS = Limits(max_stored_bytes=FITTING * FRAMES * FRAME_BYTES)
WORDING = Wording(reset_needs_prompt="", first_call_needs_prompt="", frames_needed="")


def observation(session: int) -> Observe:
    frames = [bytes(FRAME_BYTES)] * FRAMES
    return Observe(id=1, session=str(session), first=1, frames=frames, fmt="rgb8", w=SIDE, h=SIDE)


@dataclass(frozen=True)
class Pixels:
    count: int

    def __len__(self) -> int:
        return self.count

    def decode(self, new: slice, *, keep: int, room_bytes: int) -> list[np.ndarray]:
        return [np.zeros((SIDE, SIDE, 3), np.uint8)] * self.count

    def sent(self, new: slice) -> list[SentFrame]:
        return [SentFrame(bytes(FRAME_BYTES), (SIDE, SIDE))] * len(range(self.count)[new])


async def while_the_device_is_busy(manager: SessionManager, requests) -> tuple[int, list[object]]:
    """Bytes of frames that are held once all others were refused, and what became of the requests."""
    block = threading.Event()
    busy = asyncio.create_task(manager._device.run(block.wait, priority=0.0, ticket=Ticket()))
    await asyncio.sleep(0)
    running = [asyncio.create_task(request) for request in requests]
    try:
        while sum(task.done() for task in running) < SESSIONS - FITTING:
            await asyncio.sleep(0.005)
        held = manager._table.waiting_bytes + manager._observations._arriving_bytes
    finally:
        block.set()
    await busy
    results = await asyncio.gather(*running, return_exceptions=True)
    assert manager._observations._arriving_bytes == 0
    return held, results


def check(held: int, results: list[object]) -> None:
    assert held == LIMITS.max_stored_bytes
    refused = [result for result in results if isinstance(result, ProtocolError)]
    assert [error.code for error in refused] == ["overloaded"] * (SESSIONS - FITTING)
    assert "store of undigested frames is full" in str(refused[0])


def test_observations_at_once_share_the_room():
    async def fly() -> None:
        manager = SessionManager(NullPolicy(), limits=LIMITS)
        for session in range(SESSIONS):
            await manager.start("", Start(id=0, session=str(session), prompt="go"))
        await asyncio.sleep(0.1)
        requests = [manager.observe("", observation(session)) for session in range(SESSIONS)]
        held, results = await while_the_device_is_busy(manager, requests)
        check(held, results)
        refused = next(index for index, result in enumerate(results) if isinstance(result, ProtocolError))
        assert (await manager.observe("", observation(refused))).frames == FRAMES  # nothing of it had been stored
        manager.close()

    asyncio.run(asyncio.wait_for(fly(), 60))


def test_first_calls_that_wait_for_their_session_share_the_room():
    async def fly() -> None:
        manager = SessionManager(NullPolicy(), limits=LIMITS)
        calls = [
            ImplicitCall(session=str(index), frames=Pixels(FRAMES), wording=WORDING, prompt="go")
            for index in range(SESSIONS)
        ]
        held, results = await while_the_device_is_busy(manager, [manager.call("", call) for call in calls])
        check(held, results)
        assert manager.sessions == FITTING
        manager.close()

    asyncio.run(asyncio.wait_for(fly(), 60))
