"""Where a ZeroMQ door may listen, and what becomes of its socket files."""

import os
import socket as socketlib
import stat
from pathlib import Path

import pytest
from zmq_calls import FRAME, LOCAL

from worldvln_edge.client import SessionClient
from worldvln_edge.curve_keys import write_key_pair
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, UnsafeAddressError
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.session_server import SessionServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.doors.zmq_endpoint import ZmqEndpoint, ZmqEndpointError
from worldvln_edge.runtime.sessions.null_policy import NullPolicy


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:8003", "tcp://*:8003", "tcp://drone:8003", "tcp://eth0:8003", "tcp://[::]:8003"]
)
def test_listening_beyond_this_machine_needs_keys_or_a_flag(endpoint: str, folder: Path):
    config = ZmqConfig(endpoints=(endpoint,))
    with pytest.raises(UnsafeAddressError, match=r"--zmq-key-file, --zmq-clients.*--key-file.*--allow-remote"):
        SessionServer(NullPolicy(), zmq=config)
    SessionServer(NullPolicy(), zmq=config, keys=["k"])
    SessionServer(NullPolicy(), zmq=config, allow_remote=True)
    pair = write_key_pair(folder, "server")
    SessionServer(NullPolicy(), zmq=ZmqConfig(endpoints=(endpoint,), server_keys=pair, client_keys=frozenset()))
    with pytest.raises(UnsafeAddressError):  # encrypted, but for everybody
        SessionServer(NullPolicy(), zmq=ZmqConfig(endpoints=(endpoint,), server_keys=pair))


@pytest.mark.parametrize(
    "text", ["", "8003", "udp://127.0.0.1:1", "tcp://", "tcp://:1", "tcp://a:70000", "tcp://::1:1", "ipc://"]
)
def test_what_is_no_address_is_refused_with_examples(text: str):
    with pytest.raises(ZmqEndpointError, match=r"tcp://127\.0\.0\.1:8003, or ipc:///PATH"):
        ZmqEndpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("tcp://127.0.0.1", "tcp://127.0.0.1:8003"),
        ("tcp://localhost:9", "tcp://127.0.0.1:9"),
        ("tcp://[::1]", "tcp://[::1]:8003"),
        ("tcp://*:*", "tcp://*:*"),
    ],
)
def test_address_is_bound_as_zeromq_wants_it(text: str, bound: str):
    assert ZmqEndpoint.parse(text).url == bound


def test_localhost_is_served():
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=("tcp://localhost:*",))) as server:
        port = server.server.zmq_urls[0].rpartition(":")[2]
        with SessionClient(f"tcp://localhost:{port}") as client:
            assert client.ping().ready


def test_abstract_name_needs_no_file(context):
    name = f"ipc://@worldvln-{os.getpid()}"
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(name,))) as server, SessionClient(name) as client:
        assert server.server.zmq_urls == (name,)
        assert client.ping().ready


def test_ipv6_loopback_is_served():
    try:
        with socketlib.socket(socketlib.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    config = ZmqConfig(endpoints=("tcp://[::1]:*",))
    with BackgroundServer(NullPolicy(), zmq=config) as server, SessionClient(server.server.zmq_urls[0]) as client:
        assert client.ping().ready


def test_server_without_a_port_is_served_over_zmq_alone():
    with BackgroundServer(NullPolicy(), None, zmq=LOCAL) as server, SessionClient(server.server.zmq_urls[0]) as client:
        assert (server.url, server.server.bound_port) == ("", 0)
        client.start("go")
        assert client.observe([FRAME]).segment == 0


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_socket_file_is_closed_to_others_and_removed_at_the_end(folder: Path, mode: int):
    path = folder / "s"
    before = os.umask(0)
    os.umask(before)
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{path}",), ipc_mode=mode)):
        assert stat.S_IMODE(path.lstat().st_mode) == mode
        after = os.umask(before)
        assert after == before
    assert not path.exists()


def test_stale_socket_file_is_replaced_and_nothing_else(folder: Path):
    stale = folder / "s"
    with socketlib.socket(socketlib.AF_UNIX) as left_behind:
        left_behind.bind(str(stale))
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{stale}",))):
        with SessionClient(f"ipc://{stale}") as client:
            assert client.ping().ready
        with pytest.raises(AddressInUseError, match="another server listens there"):
            BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{stale}",))).__enter__()
        assert stale.exists()  # the refused server took nothing away
    precious = folder / "data"
    precious.write_text("frames")
    link = folder / "link"
    link.symlink_to(precious)
    for path in (precious, link):
        with pytest.raises(ZmqEndpointError, match="something that is no socket"):
            BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{path}",))).__enter__()
    assert precious.read_text() == "frames"
    with pytest.raises(ZmqEndpointError, match="there is no folder"):
        BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/none/s",))).__enter__()
    with pytest.raises(ZmqEndpointError, match="too long"):
        BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/{110 * 'x'}",))).__enter__()


def test_taken_port_says_what_to_do_and_leaves_no_file(folder: Path):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        taken = server.server.zmq_urls[0]
        with pytest.raises(AddressInUseError, match="--zmq ENDPOINT"):
            BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/s", taken))).__enter__()
        assert list(folder.iterdir()) == []


def test_zmq_door_is_closed_again_when_the_port_is_taken(folder: Path):
    with BackgroundServer(NullPolicy()) as server:
        second = BackgroundServer(
            NullPolicy(), port=server.server.bound_port, zmq=ZmqConfig(endpoints=(f"ipc://{folder}/s",))
        )
        with pytest.raises(AddressInUseError, match="--ws HOST:PORT"):
            second.__enter__()
    assert list(folder.iterdir()) == []
