"""CURVE keys: who gets in, who is told why not, and whose sessions they are."""

import asyncio
import shutil
from pathlib import Path

import pytest
from zmq_calls import FRAME, LOCAL

from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.curve_keys import CurveClientKeys, read_key_pair, read_public_keys, write_key_pair
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy


class Keys:
    """A server's and two clients' CURVE keys, one of them known."""

    def __init__(self, folder: Path):
        for name in ("server", "drone", "stranger"):
            write_key_pair(folder / name, name)
        (folder / "clients").mkdir()
        shutil.copy(folder / "drone" / "drone.key", folder / "clients")
        self.config = ZmqConfig(
            endpoints=("tcp://127.0.0.1:*",),
            server_keys=read_key_pair(folder / "server" / "server.key_secret"),
            client_keys=read_public_keys(folder / "clients"),
        )
        self.drone, self.stranger = (
            CurveClientKeys.read(folder / name / f"{name}.key_secret", folder / "server" / "server.key")
            for name in ("drone", "stranger")
        )


@pytest.fixture
def curve(folder: Path) -> Keys:
    return Keys(folder)


def test_known_curve_key_flies_and_strangers_are_refused(curve: Keys):
    with BackgroundServer(NullPolicy(), zmq=curve.config) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url, curve=curve.drone) as client:
            client.start("go")
            assert client.observe([FRAME]).segment == 0
        with pytest.raises(ServerError, match="does not accept this CURVE key") as refusal:
            SessionClient(url, curve=curve.stranger).__enter__()
        assert refusal.value.code == "unauthorized"
        with pytest.raises((ServerError, ServerUnreachableError), match="CURVE"):  # who hangs up first decides which
            SessionClient(url).__enter__()
        wrong_server = CurveClientKeys(own=curve.drone.own, server_public=curve.stranger.own.public)
        with pytest.raises(ServerUnreachableError, match="its CURVE keys do not match"):
            SessionClient(url, curve=wrong_server).__enter__()

        async def fly() -> None:
            async with AsyncSessionClient(url, curve=curve.drone) as client:
                await client.start("go")
                assert (await client.observe([FRAME])).segment == 0
            with pytest.raises(ServerError, match="does not accept this CURVE key"):
                await AsyncSessionClient(url, curve=curve.stranger).__aenter__()

        asyncio.run(fly())


def test_client_with_keys_is_told_when_the_server_has_none(curve: Keys):
    with (
        BackgroundServer(NullPolicy(), zmq=LOCAL) as server,
        pytest.raises((ServerError, ServerUnreachableError), match="CURVE"),
    ):
        SessionClient(server.server.zmq_urls[0], curve=curve.drone).__enter__()


def test_sessions_belong_to_the_curve_key_that_made_them(curve: Keys, folder: Path):
    shutil.copy(folder / "stranger" / "stranger.key", folder / "clients")
    config = ZmqConfig(
        endpoints=curve.config.endpoints,
        server_keys=curve.config.server_keys,
        client_keys=read_public_keys(folder / "clients"),
    )
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url, curve=curve.drone) as client, SessionClient(url, curve=curve.stranger) as other:
            client.start("go", session="mine")
            with pytest.raises(ServerError) as refusal:
                other.start(session="mine", resume=True)
            assert refusal.value.code == "unknown_session"


def test_curve_key_or_api_key_is_enough_and_the_api_key_names_the_owner(curve: Keys):
    with BackgroundServer(NullPolicy(), zmq=curve.config, keys=["secret"]) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url, curve=curve.drone) as client:
            client.start("go", session="of the curve key")
        with SessionClient(url, "secret", curve=curve.drone) as client:
            with pytest.raises(ServerError, match="no such session"):
                client.start(session="of the curve key", resume=True)
            client.start("go", session="of the api key")
        with SessionClient(server.url, "secret") as client:
            assert client.start(session="of the api key", resume=True).state == "open"


def test_encryption_without_known_clients_still_asks_for_the_api_key(curve: Keys):
    config = ZmqConfig(endpoints=curve.config.endpoints, server_keys=curve.config.server_keys)
    with BackgroundServer(NullPolicy(), zmq=config, keys=["secret"]) as server:
        url = server.server.zmq_urls[0]
        with pytest.raises(ServerError) as refusal:
            SessionClient(url, curve=curve.stranger).__enter__()
        assert refusal.value.code == "unauthorized"
        with SessionClient(url, "secret", curve=curve.stranger) as client:
            assert client.ping().ready
