"""Where a server may listen: on this machine as it likes, beyond it only with keys or when the operator says so.

Source: spec/session_protocol.md 2.8, 7.6.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence


class UnsafeAddressError(ValueError):
    """The server would listen beyond this machine without a key."""


class AddressInUseError(RuntimeError):
    """The address cannot be listened on."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, *, keys: Sequence[str], allow_remote: bool) -> None:
    """Raise UnsafeAddressError unless the host is loopback, a key is set, or the operator allowed it."""
    if not (keys or allow_remote or is_loopback(host)):
        raise UnsafeAddressError(
            f"{host} can be reached from other machines and no key is set; give a key file (--key-file), or allow it "
            "explicitly (--allow-remote)"
        )
