"""TLS of HTTP and WebSocket: who flies over it, who is refused, and what each side is told."""

import asyncio
import json
import socket as socketlib
import ssl
import time
import urllib.request
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from certificates import Authority, ServerFiles
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from http_calls import frame
from websockets.sync.client import connect

from worldvln_edge import cli
from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import ServerUnreachableError, SessionClient, TrustFileError
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.tls import TlsFileError, TlsOptionError, context_of_options, server_context
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> ServerFiles:
    return authority.certify("server", "127.0.0.1")


@pytest.fixture(scope="module")
def server(files: ServerFiles) -> Iterator[BackgroundServer]:
    context = server_context(files.certificate, files.key)
    limits = Limits(headers_within_s=0.5)
    with BackgroundServer(NullPolicy(), tls=context, http_address=("127.0.0.1", 0), limits=limits) as server:
        yield server


def check_flight_is_possible(server: BackgroundServer, authority: Authority) -> None:
    with SessionClient(server.url, ca_file=authority.file) as client:
        client.start("go")
        assert client.observe([FRAME]).segment == 0


def test_server_sends_no_ticket_that_would_cross_a_clients_first_request(server, authority):
    context = ssl.create_default_context(cafile=authority.file)
    plain = socketlib.create_connection(("127.0.0.1", server.server.bound_port))
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as line:
        assert line.version() == "TLSv1.3"
        line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert line.recv(1) == b"H"  # tickets come before an answer
        assert not line.session.has_ticket


def test_client_never_uses_a_tls_object_of_two_threads(server, authority, monkeypatch):
    """OpenSSL forbids it. A socket of `ssl` invites it, because its calls block."""

    def refuse(*_, **__):
        raise AssertionError("a blocking TLS socket")

    monkeypatch.setattr(ssl.SSLSocket, "_create", refuse)
    check_flight_is_possible(server, authority)


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_flight_over_wss_gives_three_segments(server, authority, encoding):
    assert server.url.startswith("wss://127.0.0.1:")
    with SessionClient(server.url, ca_file=authority.file, encoding=encoding) as client:
        client.start("go")
        assert [client.observe([FRAME] * count).segment for count in (1, 16, 16)] == [0, 1, 2]


def test_asynchronous_client_flies_over_wss(server, authority):
    async def fly() -> list[int]:
        async with AsyncSessionClient(server.url, ca_file=str(authority.file)) as client:
            await client.start("go")
            return [(await client.observe([FRAME] * count)).segment for count in (1, 16, 16)]

    assert asyncio.run(fly()) == [0, 1, 2]


def test_http_api_and_health_are_served_over_https(server, authority):
    context = ssl.create_default_context(cafile=authority.file)
    assert server.server.http_url.startswith("https://")
    request = {"session_id": "s", "images_base64": [frame()], "instruction": "go", "allow_future_segments": True}
    call = urllib.request.Request(
        server.server.http_url + PREDICT_PATH, json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, context=context) as answer:
        assert json.loads(answer.read())["segment_index"] == 0
    for port in (server.server.bound_port, server.server.http_port):
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/healthz", context=context) as answer:
            assert answer.read() == b"OK\n"


def test_openpi_is_served_over_wss(server, authority):
    context = ssl.create_default_context(cafile=authority.file)
    with connect(f"wss://127.0.0.1:{server.server.bound_port}/openpi", ssl=context, compression=None) as socket:
        assert msgspec.msgpack.decode(socket.recv(timeout=5))["protocol"] == "worldvln-openpi"


def test_server_of_another_authority_is_refused(server, tmp_path):
    other = Authority(tmp_path)
    with pytest.raises(ServerUnreachableError, match=r"certificate is not trusted: .*; ca_file says whom to trust"):
        SessionClient(server.url, ca_file=other.file).__enter__()

    async def connect_async() -> None:
        async with AsyncSessionClient(server.url, ca_file=other.file):
            pass

    with pytest.raises(ServerUnreachableError, match="certificate is not trusted"):
        asyncio.run(connect_async())


def test_authorities_of_the_system_do_not_vouch_for_it(server, authority):
    with pytest.raises(ServerUnreachableError, match="ca_file says whom to trust"):
        SessionClient(server.url).__enter__()
    check_flight_is_possible(server, authority)


def test_system_authorities_are_those_that_openssl_is_told(server, authority, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with SessionClient(server.url) as client:
        assert client.ping().ready


def test_certificate_of_another_host_is_refused(authority):
    other = authority.certify("drone", "drone.example")
    context = server_context(other.certificate, other.key)
    with (
        BackgroundServer(NullPolicy(), tls=context) as server,
        pytest.raises(ServerUnreachableError, match=r"not trusted: .*127\.0\.0\.1"),
    ):
        SessionClient(server.url, ca_file=authority.file).__enter__()


def test_plain_text_to_a_tls_port_is_refused_and_harms_nothing(server, authority, caplog):
    plain = server.url.replace("wss://", "ws://")
    with pytest.raises(ServerUnreachableError, match="a server with --tls-cert is reached at wss://"):
        SessionClient(plain).__enter__()
    for port in (server.server.bound_port, server.server.http_port):
        with socketlib.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            heard = b"".join(iter(lambda raw=raw: receive(raw), b""))
        assert b"HTTP" not in heard
    check_flight_is_possible(server, authority)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def receive(raw: socketlib.socket) -> bytes:
    try:
        return raw.recv(4096)
    except ConnectionResetError:
        return b""


def test_connection_that_never_shakes_hands_is_ended(server, authority):
    began = time.monotonic()
    with socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=5) as raw:
        assert receive(raw) == b""
    assert 0.3 < time.monotonic() - began < 3
    check_flight_is_possible(server, authority)


def test_tls_to_a_plain_port_is_refused_and_harms_nothing(authority):
    with BackgroundServer(NullPolicy()) as server:
        encrypted = server.url.replace("ws://", "wss://")
        with pytest.raises(ServerUnreachableError, match="a server without --tls-cert is reached at ws://"):
            SessionClient(encrypted, ca_file=authority.file).__enter__()
        with SessionClient(server.url) as client:
            assert client.ping().ready


@pytest.mark.parametrize(("newest", "is_accepted"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
def test_versions_before_1_2_are_refused(server, authority, newest, is_accepted):
    context = ssl.create_default_context(cafile=authority.file)
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # so that it is the server who refuses
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    url = f"https://127.0.0.1:{server.server.bound_port}/healthz"
    if is_accepted:
        assert urllib.request.urlopen(url, context=context).status == 200
    else:
        with pytest.raises(OSError, match=r"ALERT_PROTOCOL_VERSION|EOF occurred|reset"):
            urllib.request.urlopen(url, context=context)


def test_file_that_cannot_be_read_is_named(files, tmp_path):
    missing = tmp_path / "missing.pem"
    for certificate, key in ((missing, files.key), (files.certificate, missing)):
        with pytest.raises(TlsFileError, match=rf"cannot read {missing} \(No such file .*--tls-key"):
            server_context(certificate, key)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_key_that_others_can_open_is_refused(authority, mode):
    files = authority.certify(f"open-{mode:o}", "127.0.0.1")
    files.key.chmod(mode)
    with pytest.raises(TlsFileError, match=f"open to other users of this machine.*chmod 600 {files.key}"):
        server_context(files.certificate, files.key)


def test_key_of_another_certificate_is_refused(authority, files):
    other = authority.certify("other", "127.0.0.1")
    with pytest.raises(TlsFileError, match=f"the key in {other.key} does not belong to the certificate in"):
        server_context(files.certificate, other.key)


def test_what_is_no_pem_is_refused(files, tmp_path):
    junk = tmp_path / "junk.pem"
    junk.touch(mode=0o600)
    junk.write_text("nothing of the kind")
    for certificate, key in ((junk, files.key), (files.certificate, junk)):
        with pytest.raises(TlsFileError, match="-----BEGIN CERTIFICATE-----"):
            server_context(certificate, key)


def test_key_with_a_password_is_refused_and_nobody_is_asked(files, tmp_path):
    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    locked = tmp_path / "locked.pem"
    locked.touch(mode=0o600)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(TlsFileError, match="asks for a password"):
        server_context(files.certificate, locked)


def test_certificate_and_key_come_together_and_need_a_port(files, tmp_path):
    assert context_of_options(None, None, has_port=True) is None
    for certificate, key in ((files.certificate, None), (None, files.key)):
        with pytest.raises(TlsOptionError, match="give both --tls-cert FILE and --tls-key FILE"):
            context_of_options(certificate, key, has_port=True)
    with pytest.raises(TlsOptionError, match=r"give --ws HOST:PORT too"):
        context_of_options(files.certificate, files.key, has_port=False)
    refused = CliRunner().invoke(cli.main, ["serve", str(tmp_path), "--tls-cert", str(files.certificate)])
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1)
    assert refused.output.startswith("error: TLS needs a certificate and its key")


def test_trusted_file_that_holds_no_certificate_is_named(tmp_path):
    junk = tmp_path / "junk.pem"
    junk.write_text("nothing of the kind")
    with pytest.raises(TrustFileError, match=rf"{junk} \(it holds no certificate\); give the PEM file"):
        SessionClient("wss://drone.example", ca_file=junk)
    with pytest.raises(TrustFileError, match=r"missing\.pem \(No such file or directory\)"):
        AsyncSessionClient("wss://drone.example", ca_file=tmp_path / "missing.pem")


@pytest.mark.parametrize("url", ["ws://drone.example", "tcp://drone.example"])
def test_trusted_file_for_an_address_without_tls_is_refused(authority, url):
    with pytest.raises(TrustFileError, match="behind wss://"):
        SessionClient(url, ca_file=authority.file)
