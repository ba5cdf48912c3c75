"""Missions longer than the model's horizon, through a server: the client only keeps sending frames."""

from dataclasses import replace

import numpy as np
import pytest

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession

FRAME = np.zeros((4, 4, 3), np.uint8)


class ArrivingSession(NullSession):
    """Two centimetres a step, five when the prompt says "fast"."""

    def observe(self, frames, **options):
        chunk = super().observe(frames, **options)
        way = np.float32([5.0 if self.prompt == "fast" else 2.0, 0, 0, 0, 0, 0])
        return chunk and replace(chunk, actions=chunk.actions + way)


class ArrivingPolicy(NullPolicy):
    def __init__(self):
        super().__init__()
        self.opened: list[ArrivingSession] = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened.append(ArrivingSession(self, prompt, seed=seed, emit=emit))
        return self.opened[-1]


def test_a_chained_flight_goes_on_until_its_last_horizon():
    policy = ArrivingPolicy()
    with BackgroundServer(policy, warm_up=False) as server, SessionClient(server.url) as client:
        client.start("fast", chain=True, max_horizons=2)
        answers = [client.observe([FRAME] * count) for count in (1, 16, 16, 16, 16, 16)]
    assert [answer.segment for answer in answers] == list(range(6))
    assert [answer.frames for answer in answers] == [1, 17, 33, 49, 65, 81]
    assert [answer.need for answer in answers] == [16, 16, 16, 16, 16, 0]
    assert [answer.done for answer in answers] == [False] * 5 + [True]
    assert not any(answer.is_settled for answer in answers)
    assert [session.prompt for session in policy.opened] == ["fast", "fast"]


def test_frames_one_by_one_and_a_prompt_in_flight():
    policy = ArrivingPolicy()
    with BackgroundServer(policy, warm_up=False) as server, SessionClient(server.url) as client:
        client.start("fast", chain=True)
        segments = []
        for index in range(60):
            answer = client.observe([FRAME], prompt="slow" if index == 40 else None)
            segments += [answer.segment] if answer.segment >= 0 else []
    assert segments == [0, 1, 2, 3]
    assert [session.prompt for session in policy.opened] == ["slow", "slow"]


def test_a_drone_that_hardly_moves_has_settled():
    with BackgroundServer(ArrivingPolicy(), warm_up=False) as server, SessionClient(server.url) as client:
        client.start("fast", chain=True)
        first = client.observe([FRAME])
        second = client.observe([FRAME] * 16, prompt="slow")
        assert (first.is_settled, second.is_settled) == (False, True)  # 16 steps of 2 cm
        client.start("slow")
        assert not client.observe([FRAME]).is_settled  # nobody counts where a flight ends by itself


def test_a_resent_segment_of_an_earlier_horizon_is_answered_from_memory():
    with BackgroundServer(ArrivingPolicy(), warm_up=False) as server, SessionClient(server.url) as client:
        client.start("fast", chain=True)
        for count in (1, 16, 16, 16, 16):
            client.observe([FRAME] * count)
        again = client.observe([], segment=1)
        assert (again.segment, again.frames) == (1, 65)


def test_horizons_are_bounded():
    limits = Limits(max_horizons=3)
    with (
        BackgroundServer(ArrivingPolicy(), warm_up=False, limits=limits) as server,
        SessionClient(server.url) as client,
    ):
        with pytest.raises(ServerError, match=r"max_horizons must be 1\.\.3, found 4"):
            client.start("go", chain=True, max_horizons=4)
        client.start("go", chain=True)
        sent, answer = 1, client.observe([FRAME])
        while not answer.done:
            answer = client.observe([FRAME] * answer.need)
            sent = answer.frames
        assert (answer.segment, sent) == (8, 1 + 8 * 16)
