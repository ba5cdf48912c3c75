"""Whom a client of wss:// trusts: the authorities of this system, or those of one file.

Source: spec/session_protocol.md 7.6.
"""

from __future__ import annotations

import ssl
from pathlib import Path


class TrustFileError(ValueError):
    """A file of trusted certificates that cannot be used. The message says what to do."""


def client_context(url: str, ca_file: Path | str | None) -> ssl.SSLContext | None:
    """How the client of an address checks its server's certificate and name; None where TLS is not spoken.

    Args:
        url: as `server_address.server_url` gives it.
        ca_file: PEM file with the only authorities (or server certificates) to trust; None: those of this system.

    Raises:
        TrustFileError: the file holds no certificate, or the address is not encrypted.
    """
    if not url.startswith("wss://"):
        if ca_file is not None:
            raise TrustFileError(f"ca_file says whom to trust behind wss://, but {url} is not such an address")
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror if error.errno and not isinstance(error, ssl.SSLError) else "it holds no certificate"
        raise TrustFileError(
            f"cannot read certificates from {ca_file} ({reason}); give the PEM file of the authority that signed the "
            "server's certificate"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
