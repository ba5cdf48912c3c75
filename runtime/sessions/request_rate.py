"""How many requests a second one client may send: a token bucket for each key, or each address where no key is used.

Source: spec/session_protocol.md 7.7 (`busy`), 7.8.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from worldvln_edge.protocol import Limits, ProtocolError

_ROUNDING = 1e-6  # whoever waits as long as told must find its token
_MOST_BUCKETS = 4096
"""Of the clients heard last; more addresses than that must not take memory."""


class RequestRate:
    """One bucket for each client. It holds one second's worth of requests, and never fewer than `max_in_flight`.

    Args:
        limits: `max_requests_per_s`; 0 lets everything through.
        clock: seconds, monotonic.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._clock = limits.max_requests_per_s, clock
        self._burst = max(float(limits.max_in_flight), self._per_s)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Tokens and when they were counted, by client; the one heard last is at the end."""

    def take(self, client: str) -> None:
        """Count one request of a client: its key's name space, or its address.

        Raises:
            ProtocolError: `busy`; `retry_ms` says when the next one will be let through.
        """
        if self._per_s <= 0:
            return
        now_s = self._clock()
        tokens, counted_s = self._buckets.pop(client, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - counted_s) * self._per_s)
        is_allowed = tokens >= 1 - _ROUNDING
        self._buckets[client] = (max(0.0, tokens - 1) if is_allowed else tokens, now_s)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        if not is_allowed:
            raise ProtocolError(
                "busy",
                f"more than {self._per_s:g} requests a second; send fewer",
                retry_ms=max(1, math.ceil((1 - tokens) / self._per_s * 1e3)),
            )
