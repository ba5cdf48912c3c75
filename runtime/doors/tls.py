"""TLS of the HTTP and WebSocket ports: a certificate and its key, read and checked before anything is served.

Source: spec/session_protocol.md 7.6.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from worldvln_edge.private_file import is_open_to_others


class TlsFileError(ValueError):
    """A certificate or key that cannot be served with. The message names the file and says what to do."""


class TlsOptionError(ValueError):
    """Options that make no sense without another one."""


def context_of_options(certificate: Path | None, key: Path | None, *, has_port: bool) -> ssl.SSLContext | None:
    """What --tls-cert and --tls-key of `worldvln-edge serve` say; None without them.

    Raises:
        TlsOptionError: one of them is missing, or there is no port to encrypt.
        TlsFileError: see `server_context`.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise TlsOptionError("TLS needs a certificate and its key: give both --tls-cert FILE and --tls-key FILE")
    if not has_port:
        raise TlsOptionError("--tls-cert is for HTTP and WebSocket: give --ws HOST:PORT too (ZeroMQ has CURVE keys)")
    return server_context(certificate, key)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """What `SessionServer(tls=...)` takes: TLS 1.2 or newer.

    Args:
        certificate: PEM file, the server's certificate first, then those between it and the authority.
        key: PEM file with the private key of the first certificate, without a password; closed to other users.

    Raises:
        TlsFileError: a file cannot be read, is none of these, or the key is another certificate's or open to others.
    """
    for path in (certificate, key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise TlsFileError(
                f"cannot read {path} ({error.strerror}); give --tls-cert and --tls-key files that this user may read"
            ) from error
    if is_open_to_others(key):
        raise TlsFileError(f"{key} is open to other users of this machine; close it with: chmod 600 {key}")

    def password() -> str:
        raise TlsFileError(f"{key} asks for a password; give a key without one, protected by its file mode")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # A ticket reaches a client while it sends its first request. One that reads and writes from two threads then loses
    # the request now and then, because OpenSSL handles the ticket as a handshake; and our connections last.
    context.num_tickets = 0
    try:
        context.load_cert_chain(certificate, key, password=password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsFileError(f"the key in {key} does not belong to the certificate in {certificate}") from error
        raise TlsFileError(
            f"{certificate} and {key} are no certificate and private key in PEM form; such a file begins with "
            "-----BEGIN CERTIFICATE----- or -----BEGIN PRIVATE KEY-----"
        ) from error
    return context
