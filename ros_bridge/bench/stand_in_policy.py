"""A policy process without a model or a server, to be killed: beats, and plans a circle of 4.8 m, twice a second.

Run as `python -m worldvln_edge.ros_bridge.bench.stand_in_policy SOCKET`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from worldvln_edge.ros_bridge.setpoints.policy_link import Action, Alive, Chunk, LinkError, PolicyLink

_BEAT_S, _PLAN_S, _FPS = 0.01, 0.5, 16.0
_CHUNK: list[Action] = [(5.0, 0.0, 0.0, 0.0, 3.75, 0.0)] * 16


def beat(socket_path: Path) -> None:
    """Until the setpoint process has gone."""
    link, number, plan_due_s = PolicyLink(socket_path), 0, time.monotonic()
    while True:
        now_ns = time.monotonic_ns()
        try:
            link.send(Alive(seen_ns=now_ns))
            if now_ns / 1e9 >= plan_due_s:
                number, plan_due_s = number + 1, plan_due_s + _PLAN_S
                link.send(Chunk(number=number, actions=_CHUNK, fps=_FPS, seen_ns=now_ns))
        except LinkError:
            return
        time.sleep(_BEAT_S)


if __name__ == "__main__":
    beat(Path(sys.argv[1]))
