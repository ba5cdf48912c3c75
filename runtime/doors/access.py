"""Who may connect: API keys in constant time, and an allow list for browsers.

Source: spec/session_protocol.md 7.6.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from worldvln_edge.protocol import ProtocolError


class KeyFileError(ValueError):
    """A key file that gives no usable key."""


def read_key_file(path: Path) -> tuple[str, ...]:
    """API keys of a text file: one a line; blank lines and lines that start with # are skipped.

    Raises:
        KeyFileError: unreadable, not text, or without a key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read keys from {path}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise KeyFileError(f"{path} holds no key; write one key a line")
    return keys


class AccessRule:
    """Checks upgrade requests.

    Args:
        keys: accepted API keys; none means that no key is asked for.
        origins: accepted `Origin` headers. Programs send none; a browser always does.
    """

    def __init__(self, *, keys: Sequence[str] = (), origins: Sequence[str] = ()):
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    def peer(self, headers: Mapping[str, str]) -> str:
        """The name space of the client's sessions: "" without keys, else a digest of its key.

        Args:
            headers: of the upgrade request; lower-case names.

        Raises:
            ProtocolError: `forbidden` (Origin), `unauthorized` (key missing or wrong).
        """
        origin = headers.get("origin")
        if origin is not None and origin.rstrip("/").lower() not in self._origins:
            raise ProtocolError("forbidden", "this Origin is not in the server's allow list")
        if not self._keys:
            return ""
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() not in ("api-key", "bearer") or not shown.strip():
            raise ProtocolError("unauthorized", "a key is needed: send Authorization: Api-Key <key>")
        return self.peer_of_key(shown.strip())

    def peer_of_key(self, key: str | None) -> str:
        """As `peer`, for transports whose clients show the key in a message.

        Raises:
            ProtocolError: `unauthorized` (key missing or wrong).
        """
        if not self._keys:
            return ""
        if not key:
            raise ProtocolError("unauthorized", "a key is needed: hello carries it as `key`")
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape"))
        # Every key is compared, as digests of one length: the time tells neither which one matched, nor how far, nor
        # how long it is.
        matches = [hmac.compare_digest(known, given.digest()) for known in self._keys]
        if not any(matches):
            raise ProtocolError("unauthorized", "the key is wrong")
        return given.hexdigest()

    @property
    def asks_for_keys(self) -> bool:
        return bool(self._keys)
