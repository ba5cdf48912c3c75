"""CURVE keys: how a ZeroMQ client and server prove to each other who they are, and encrypt what they say.

A key pair lies in two files, as pyzmq and CZMQ write them: `NAME.key` holds the public key and may be handed out,
`NAME.key_secret` holds both and stays on its machine (mode 0600). Keys are Z85 text of 40 characters.
Needs pyzmq. Source: spec/session_protocol.md 7.6; ZeroMQ RFC 26 (CURVE), RFC 32 (Z85).
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85

from worldvln_edge.private_file import is_open_to_others

PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"
_KEY_BYTES = 32


class CurveKeyError(ValueError):
    """A key file that cannot be used or written. The message names the file and says what to do."""


@dataclass(frozen=True, kw_only=True)
class CurveKeyPair:
    public: bytes
    """Z85 text."""
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CurveClientKeys:
    """What a client needs: its own pair, and the public key of the server that it means."""

    own: CurveKeyPair
    server_public: bytes

    @classmethod
    def read(cls, own: Path | str, server: Path | str) -> CurveClientKeys:
        """From the client's `NAME.key_secret` and the server's `NAME.key`. Raises CurveKeyError."""
        return cls(own=read_key_pair(Path(own)), server_public=read_public_key(Path(server)))


def write_key_pair(folder: Path, name: str) -> CurveKeyPair:
    """Make a new pair and write `NAME.key` and `NAME.key_secret`; existing keys are never replaced.

    Raises:
        CurveKeyError: the name is no plain file name, a file exists, or the folder cannot be written.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise CurveKeyError(f"{name!r} is no name for a key; give a plain file name, such as drone-1")
    public, secret = zmq.curve_keypair()
    secret_path, public_path = folder / f"{name}{SECRET_SUFFIX}", folder / f"{name}{PUBLIC_SUFFIX}"
    for path in (secret_path, public_path):
        if path.exists():
            raise CurveKeyError(f"{path} exists; a key is not replaced. Remove it, or give another name")
    text = 'metadata\ncurve\n    public-key = "{}"\n'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(
            secret_path,
            "#   CURVE key pair of worldvln-edge. Keep it secret.\n"
            + text.format(public.decode())
            + f'    secret-key = "{secret.decode()}"\n',
            mode=0o600,
        )
        try:
            _write_new(
                public_path, "#   CURVE public key of worldvln-edge.\n" + text.format(public.decode()), mode=0o644
            )
        except OSError:
            with contextlib.suppress(OSError):
                secret_path.unlink()  # half a pair would be in the way of the next attempt
            raise
    except OSError as error:
        raise CurveKeyError(f"cannot write keys into {folder}: {error.strerror}") from error
    return CurveKeyPair(public=public, secret=secret)


def read_key_pair(path: Path) -> CurveKeyPair:
    """The pair of a `NAME.key_secret` file.

    Raises:
        CurveKeyError: unreadable, no key pair, or readable by other users of this machine.
    """
    public, secret = _read(path)
    if secret is None:
        raise CurveKeyError(f"{path} holds no secret key; give the file {path.stem}{SECRET_SUFFIX}")
    if is_open_to_others(path):
        raise CurveKeyError(f"{path} is open to other users of this machine; close it with: chmod 600 {path}")
    return CurveKeyPair(public=public, secret=secret)


def read_public_key(path: Path) -> bytes:
    """The public key of a `NAME.key` file. Raises CurveKeyError."""
    return _read(path)[0]


def read_public_keys(folder: Path) -> frozenset[bytes]:
    """The public keys of all `*.key` files in a folder.

    Raises:
        CurveKeyError: no such folder, no key in it, or a file that is none.
    """
    paths = sorted(folder.glob(f"*{PUBLIC_SUFFIX}")) if folder.is_dir() else []
    if not paths:
        raise CurveKeyError(f"{folder} holds no client's public key; copy the NAME.key files of the clients into it")
    return frozenset(read_public_key(path) for path in paths)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        raise CurveKeyError(f"cannot read a CURVE key from {path}; make one with: worldvln-edge keygen NAME") from error
    for key in (public, secret):
        if key is not None and not _is_key(key):
            raise CurveKeyError(f"{path} holds a damaged key; make a new pair with: worldvln-edge keygen NAME")
    return public, secret


def _is_key(text: bytes) -> bool:
    try:
        return len(z85.decode(text)) == _KEY_BYTES
    except (KeyError, ValueError, struct.error):  # a foreign character, a wrong length, five that exceed 32 bits
        return False


def _write_new(path: Path, text: str, *, mode: int) -> None:
    """Create the file with this mode from its first moment; never follow a link or replace a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
