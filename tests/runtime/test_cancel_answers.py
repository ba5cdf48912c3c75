"""What `cancel` answers is as true after a crash as before it, and every unanswered request can be cancelled."""

import asyncio
import threading

import numpy as np

from worldvln_edge.protocol import Cancel, Error, Hello, Observe, Ping, SessionState, Start
from worldvln_edge.runtime.doors.native_connection import NativeConnection
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.wire import encode

PIXELS = np.zeros((4, 4, 3), np.uint8).tobytes()


def observation(request: int, first: int, session: str = "s") -> Observe:
    return Observe(id=request, session=session, first=first, frames=[PIXELS], fmt="rgb8", w=4, h=4)


class Line:
    """A connection without a transport: what was sent on it, in order."""

    def __init__(self, manager: SessionManager):
        self.answers: list[object] = []
        self.connection = NativeConnection(
            manager, admit=lambda hello: "", address="", send=lambda message, encoding: self.answers.append(message)
        )

    async def say(self, request) -> None:
        await self.connection.receive(encode(request, "msgpack"), "msgpack")

    async def answer(self, request: int):
        while True:
            for message in self.answers:
                if message.re == request:
                    return message
            await asyncio.sleep(0.005)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_answer_to_cancel_waits_for_the_journal(tmp_path):
    async def scenario() -> None:
        journal = SessionJournal(tmp_path)
        manager = SessionManager(NullPolicy(), journal=journal)
        line, disk, device = Line(manager), threading.Event(), threading.Event()
        await line.say(Hello(id=1, v=[1]))
        await line.say(Start(id=2, session="s", prompt="go"))
        await line.answer(2)
        await asyncio.sleep(0.05)
        busy = asyncio.create_task(manager._device.run(device.wait, priority=0.0, ticket=Ticket()))
        slow = journal._writer.submit(disk.wait)
        try:
            await line.say(observation(3, 1))
            session = manager._table.find(("", "s"))
            while session.frames == 0:
                await asyncio.sleep(0.005)
            cancelling = asyncio.create_task(line.say(Cancel(id=4, target=3)))
            await asyncio.sleep(0.1)
            assert [message.re for message in line.answers] == [1, 2]  # nobody was told of the frame
        finally:
            disk.set()
            device.set()
        await asyncio.gather(cancelling, busy, asyncio.wrap_future(slow))
        state = await line.answer(4)
        assert isinstance(state, SessionState)
        assert state.frames == 1
        assert journal.read(("", "s")).result().frames[0].shape == (4, 4, 3)
        refusal = await line.answer(3)
        assert isinstance(refusal, Error)
        assert (refusal.code, refusal.frames) == ("cancelled", 1)
        manager.close()

    run(scenario())


def test_request_that_waits_behind_many_others_can_still_be_cancelled():
    async def scenario() -> None:
        manager = SessionManager(NullPolicy())
        line = Line(manager)
        await line.say(Hello(id=1, v=[1]))
        for request, session in ((2, "waits"), (3, "flies")):
            await line.say(Start(id=request, session=session, prompt="go"))
            await line.answer(request)
        async with manager._table.turn(("", "waits")):
            await line.say(observation(4, 1, "waits"))
            for request in range(5, 205):
                await line.say(observation(request, 1, "flies"))  # the same frame again and again
                await line.answer(request)
            await line.say(Cancel(id=300, target=4))
            state = await line.answer(300)
            assert isinstance(state, SessionState)
            assert state.session == "waits"
        refusal = await line.answer(4)
        assert refusal.code == "cancelled"
        await line.say(Cancel(id=301, target=5))  # answered long ago
        assert (await line.answer(301)).code == "bad_request"
        await line.say(Ping(id=302))
        await line.answer(302)
        manager.close()

    run(scenario())
