"""Ports that the server wants, and whether the computer knows what time it is.

Stamps of frames come from the drone's clock, and recordings, logs and autopilot are compared by it.
Source: timedatectl(1), chronyc(1).
"""

from __future__ import annotations

import errno
import http.client
import socket
from typing import Any

import msgspec

from worldvln_edge.runtime.doctor.finding import Finding
from worldvln_edge.runtime.doctor.machine import Machine

_OF_ALL = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""All addresses -> the one on which a server behind them is asked."""
_PATIENCE_S = 2.0
_FAR_S = 0.1
"""A clock that is further off moves a frame by more than one and a half slots of 1/16 s."""


def check_port(host: str, port: int) -> Finding:
    """May the server listen there? Port 0 is always free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    name = f"port {port}"
    try:
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_our_server(host, port):
            return Finding(check=name, state="note", what=f"a policy server listens on {host} already")
        return Finding(
            check=name, state="problem", what=f"{host} port {port}: {error.strerror}", do=_way_out(error, port)
        )
    return Finding(check=name, state="ok", what=f"free on {host}")


def _is_our_server(host: str, port: int) -> bool:
    """Does a server of this software answer there? One behind TLS does not tell."""
    connection = http.client.HTTPConnection(_OF_ALL.get(host, host), port, timeout=_PATIENCE_S)
    try:
        connection.request("GET", "/health")
        report = msgspec.json.decode(connection.getresponse().read(2**16), type=dict[str, Any])
    except (OSError, http.client.HTTPException, msgspec.MsgspecError, UnicodeError):
        return False
    finally:
        connection.close()
    return {"protocol", "backend"} <= report.keys()


def _way_out(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"stop what listens there (`ss -ltnp 'sport = :{port}'`), or give `serve --ws` another port"
    if error.errno == errno.EACCES:
        return "ports below 1024 belong to root; take one above"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this computer has no such address; `ip address` lists them, 0.0.0.0 means all"
    return "give `serve --ws` another address"


def check_clock(machine: Machine) -> Finding:
    """Is the clock synchronised, by systemd's word or by chrony's?"""
    chrony = machine.ask("chronyc", "-c", "tracking")
    if chrony is not None and chrony.code == 0:
        fields = chrony.output.split(",")
        # The fifth field is the correction in seconds, the last one the state of leap seconds.
        if len(fields) > 4 and fields[-1] != "Not synchronised":
            try:
                offset = abs(float(fields[4]))
            except ValueError:
                offset = 0.0
            if offset <= _FAR_S:
                return Finding(check="clock", state="ok", what=f"synchronised by chrony, {offset * 1e3:.1f} ms off")
            return Finding(
                check="clock",
                state="warning",
                what=f"chrony still corrects {offset:.1f} s",
                do="wait, or `sudo chronyc makestep` before the flight",
            )
        return _not_synchronised("chrony has no source")
    systemd = machine.ask("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    if systemd is not None and systemd.code == 0:
        if systemd.output == "yes":
            return Finding(check="clock", state="ok", what="synchronised")
        return _not_synchronised("not synchronised")
    return Finding(
        check="clock",
        state="note",
        what="cannot tell whether it is synchronised (neither timedatectl nor chronyc answers)",
    )


def _not_synchronised(what: str) -> Finding:
    return Finding(
        check="clock",
        state="warning",
        what=what,
        do="connect it once to a time server (`sudo timedatectl set-ntp true`), or to the ground station's chrony, or "
        "let the autopilot's GPS set it; recordings and logs carry wrong dates otherwise",
    )
