"""What systemd hears of the server: ready, alive, stopping; and nothing once the device is stuck."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from worldvln_edge.runtime.doors.systemd_watchdog import SystemdNotifier
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, Ticket

SERVER = (
    "from worldvln_edge.runtime.doors.server import serve\n"
    "from worldvln_edge.runtime.doors.systemd_watchdog import SystemdNotifier\n"
    "from worldvln_edge.runtime.sessions.null_policy import NullPolicy\n"
    "serve(NullPolicy(), port=0, systemd=SystemdNotifier.from_environment())\n"
)


@pytest.fixture
def systemd(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        yield listening


def test_server_says_ready_alive_and_stopping(systemd: socket.socket):
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "300000"}
    environment.pop("WATCHDOG_PID", None)
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment) as server:
        try:
            first = systemd.recv(1000).decode()
            heard = {systemd.recv(1000).decode() for _ in range(3)}
            server.send_signal(signal.SIGTERM)
            while (last := systemd.recv(1000).decode()) == "WATCHDOG=1":
                pass
        finally:
            server.terminate()
    assert first.startswith("READY=1\nSTATUS=ready at ws://127.0.0.1:")
    assert heard == {"WATCHDOG=1"}
    assert last == "STOPPING=1"


def test_watchdog_is_not_fed_while_device_work_is_stuck(systemd: socket.socket, caplog: pytest.LogCaptureFixture):
    notifier, goes_on = SystemdNotifier(systemd.getsockname(), watchdog_s=0.03, stuck_s=0.2), threading.Event()
    systemd.setblocking(False)

    def heard() -> int:
        count = 0
        while True:
            try:
                count += systemd.recv(1000) == b"WATCHDOG=1"
            except BlockingIOError:
                return count

    async def fly() -> tuple[int, int, int]:
        queue = DeviceQueue()
        feeding = asyncio.create_task(notifier.keep_alive(lambda: queue.running_s))
        await asyncio.sleep(0.1)
        idle = heard()
        stuck = asyncio.create_task(queue.run(goes_on.wait, priority=0.0, ticket=Ticket()))
        await asyncio.sleep(0.5)
        heard()
        await asyncio.sleep(0.2)
        while_stuck = heard()
        goes_on.set()
        await stuck
        await asyncio.sleep(0.2)
        feeding.cancel()
        queue.close()
        return idle, while_stuck, heard()

    idle, while_stuck, after = asyncio.run(fly())
    assert idle > 0
    assert while_stuck == 0
    assert after > 0
    assert caplog.text.count("the watchdog is not fed any more") == 1


def test_environment_of_a_service_is_read():
    here = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = SystemdNotifier.from_environment(here)
    assert notifier is not None
    assert notifier.watchdog_s == 2.0


@pytest.mark.parametrize("changes", [{"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_PID": "1"}])
def test_service_without_a_watchdog_of_its_own_is_not_watched(changes: dict[str, str]):
    here = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "2000000", **changes}
    notifier = SystemdNotifier.from_environment(here)
    assert notifier is not None
    assert notifier.watchdog_s is None


def test_process_that_is_no_service_tells_nobody():
    assert SystemdNotifier.from_environment({}) is None


def test_systemd_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    SystemdNotifier(str(tmp_path / "nobody")).tell("READY=1")
    assert "systemd was not told READY=1" in caplog.text
