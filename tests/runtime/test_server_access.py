"""Who gets in, what is refused at the door, and what a client hears when nobody is there."""

import json
import socket as socketlib

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from worldvln_edge.client import AnswerTimeoutError, ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.client_errors import ServerAddressError
from worldvln_edge.protocol import WEBSOCKET_SUBPROTOCOL, Limits, ProtocolError
from worldvln_edge.runtime.doors.access import AccessRule, KeyFileError, read_key_file
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, UnsafeAddressError, is_loopback
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.session_server import SessionServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.server_address import server_url

FRAME = np.zeros((8, 8, 3), dtype=np.uint8)


def test_key_is_asked_for_and_a_wrong_one_is_refused():
    with BackgroundServer(NullPolicy(), keys=["right", "other"]) as server:
        for key in (None, "wrong"):
            with pytest.raises(ServerError, match="API key") as refusal:
                SessionClient(server.url, key).__enter__()
            assert refusal.value.code == "unauthorized"
        with SessionClient(server.url, "right") as client:
            assert client.ping().ready


def test_sessions_belong_to_the_key_that_made_them():
    with BackgroundServer(NullPolicy(), keys=["one", "two"]) as server, SessionClient(server.url, "one") as client:
        client.start("go", session="mine")
        with SessionClient(server.url, "two") as stranger, pytest.raises(ServerError) as refusal:
            stranger.start(session="mine", resume=True)
        assert refusal.value.code == "unknown_session"
        assert client.observe([FRAME]).segment == 0


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"authorization": "Api-Key secret"}, None),
        ({"authorization": "bearer secret"}, None),
        ({"authorization": "Basic secret"}, "unauthorized"),
        ({"authorization": "Api-Key "}, "unauthorized"),
        ({"authorization": "Api-Key s\u00e9cret\udcff"}, "unauthorized"),
        ({}, "unauthorized"),
        ({"authorization": "Api-Key secret", "origin": "https://evil.example"}, "forbidden"),
        ({"authorization": "Api-Key secret", "origin": "https://Ground.example/"}, None),
    ],
)
def test_access_rule(headers, code):
    rule = AccessRule(keys=["secret"], origins=["https://ground.example"])
    if code is None:
        assert rule.peer(headers)
    else:
        with pytest.raises(ProtocolError) as refusal:
            rule.peer(headers)
        assert refusal.value.code == code


def test_browser_of_an_unknown_origin_is_refused_with_403():
    with BackgroundServer(NullPolicy()) as server, pytest.raises(InvalidStatus) as refused:
        connect(server.url, origin="https://evil.example", compression=None).__enter__()
    assert refused.value.response.status_code == 403


def test_connections_are_counted():
    with BackgroundServer(NullPolicy(), limits=Limits(max_connections=1)) as server, SessionClient(server.url):
        late = SessionClient(server.url)
        with pytest.raises(ServerUnreachableError, match="503"):
            late.__enter__()


def test_listening_beyond_this_machine_without_a_key_needs_a_flag():
    with pytest.raises(UnsafeAddressError, match="--key-file"):
        SessionServer(NullPolicy(), "0.0.0.0")
    SessionServer(NullPolicy(), "0.0.0.0", keys=["k"])
    SessionServer(NullPolicy(), "0.0.0.0", allow_remote=True)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("drone", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_taken_port_says_what_to_do():
    with BackgroundServer(NullPolicy()) as server, pytest.raises(AddressInUseError, match="--ws HOST:PORT"):
        BackgroundServer(NullPolicy(), port=server.server.bound_port).__enter__()


def test_key_file_skips_comments_and_refuses_an_empty_file(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# drones\n\nalpha\n  beta  \n")
    assert read_key_file(path) == ("alpha", "beta")
    path.write_text("# nothing\n")
    with pytest.raises(KeyFileError, match="holds no key"):
        read_key_file(path)
    with pytest.raises(KeyFileError, match="cannot read"):
        read_key_file(tmp_path / "missing")


def test_subprotocol_is_confirmed_and_optional():
    with BackgroundServer(NullPolicy()) as server:
        with connect(server.url, subprotocols=[WEBSOCKET_SUBPROTOCOL], compression=None) as socket:
            assert socket.subprotocol == WEBSOCKET_SUBPROTOCOL
        with connect(server.url, compression=None) as socket:
            assert socket.subprotocol is None


def ask_json(socket, request: dict) -> dict:
    socket.send(json.dumps(request))
    return json.loads(socket.recv(timeout=5))


def test_first_message_must_be_hello_and_its_version_ours():
    with BackgroundServer(NullPolicy()) as server, connect(server.url, compression=None) as socket:
        refusal = ask_json(socket, {"t": "ping", "id": 1})
        assert (refusal["code"], refusal["retry"], refusal["re"]) == ("hello_required", True, 1)
        refusal = ask_json(socket, {"t": "hello", "id": 2, "v": [7]})
        assert (refusal["code"], refusal["msg"]) == ("unsupported_version", "this server speaks version 1")
        assert ask_json(socket, {"t": "hello", "id": 3, "v": [7, 1]})["t"] == "welcome"


def test_unknown_type_is_refused_and_the_connection_goes_on():
    with BackgroundServer(NullPolicy()) as server, connect(server.url, compression=None) as socket:
        ask_json(socket, {"t": "hello", "id": 1, "v": [1]})
        refusal = ask_json(socket, {"t": "dance", "id": 2})
        assert (refusal["code"], refusal["re"]) == ("bad_request", 2)
        assert ask_json(socket, {"t": "ping", "id": 3, "t_ns": 4, "unknown key": []})["t_ns"] == 4


def test_oversized_message_closes_the_connection_with_1009_and_the_server_lives():
    with BackgroundServer(NullPolicy(), limits=Limits(max_msg_bytes=10_000)) as server:
        with connect(server.url, compression=None) as socket:
            socket.send(b"x" * 20_000)
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=5)
        assert closed.value.rcvd.code == 1009
        with SessionClient(server.url, frame_format="rgb8") as client:
            client.start("go")
            with pytest.raises(ProtocolError, match="the server accepts 10000"):
                client.observe([np.zeros((100, 100, 3), dtype=np.uint8)])
            assert client.observe([FRAME]).segment == 0


def test_nobody_at_the_address_says_which_and_what_to_do():
    with socketlib.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ServerUnreachableError, match=rf"ws://127\.0\.0\.1:{port}/v1/session .*worldvln-edge serve"):
        SessionClient(f"127.0.0.1:{port}").__enter__()


def test_server_that_goes_away_is_given_up_after_the_time_set():
    with BackgroundServer(NullPolicy()) as server:
        client = SessionClient(server.url, reconnect_s=0.2)
        client.__enter__()
        client.start("go")
    with pytest.raises(ServerUnreachableError, match="worldvln-edge serve"):
        client.observe([FRAME])


def test_answer_that_does_not_come_in_time_is_named_and_can_be_asked_again():
    with BackgroundServer(NullPolicy(infer_s=0.3)) as server:
        with SessionClient(server.url, answer_timeout_s=0.1) as client:
            client.start("go")
            with pytest.raises(AnswerTimeoutError, match=r"within 0\.1 s"):
                client.observe([FRAME])
            name = client.session
        with SessionClient(server.url) as client:
            client.start(session=name, resume=True)
            assert client.observe([FRAME], first=1, segment=0).segment == 0


def test_observing_without_a_session_says_to_start_one():
    with BackgroundServer(NullPolicy()) as server, SessionClient(server.url) as client:
        with pytest.raises(ValueError, match=r"start\(prompt\)"):
            client.observe([FRAME])
        client.start("go")
        with pytest.raises(ValueError, match="uint8"):
            client.observe([np.zeros((8, 8, 3), dtype=np.float32)])


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8001", "ws://127.0.0.1:8001/v1/session"),
        ("http://drone:8001/", "ws://drone:8001/v1/session"),
        ("wss://drone/x/v1/session", "wss://drone/x/v1/session"),
        ("ws://[::1]:8001", "ws://[::1]:8001/v1/session"),
    ],
)
def test_server_url(given, url):
    assert server_url(given) == url


@pytest.mark.parametrize(
    "address", ["ftp://drone", "ws://drone:99999", "ws://drone:abc", "ws://[::1", "ws://", ":8001"]
)
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ServerAddressError, match="no server's address"):
        server_url(address)
