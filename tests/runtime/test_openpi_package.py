"""The published openpi-client package, unmodified, in an environment of its own (it wants an old NumPy)."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from http_calls import RememberingPolicy

from worldvln_edge.client import SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer

PACKAGE = "openpi-client==0.1.2"
UNDECLARED = "typing_extensions"  # the package imports it without saying so
PROGRAM = Path(__file__).with_name("openpi_flight.py")


@pytest.fixture(scope="session")
def openpi_python(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """An interpreter that has the package, from the package index that pip is configured for."""

    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, PACKAGE, UNDECLARED], check=True)

    return made_once("openpi-environment", make) / "bin" / "python"


@pytest.mark.slow
def test_published_client_flies_in_both_reply_modes_and_after_refusals(openpi_python):
    policy = RememberingPolicy()
    with BackgroundServer(policy) as server:
        program = [openpi_python, PROGRAM, "127.0.0.1", str(server.server.bound_port)]
        flown = subprocess.run(program, capture_output=True, text=True, timeout=120)
        assert flown.returncode == 0, flown.stderr
        with SessionClient(server.url, frame_format="rgb8") as client:
            client.start("go", seed=5)
            frames = [np.full((8, 8, 3), index, np.uint8) for index in range(33)]
            native = [client.observe(frames[start:end]).actions for start, end in ((0, 1), (1, 17), (17, 33))]
    report = json.loads(flown.stdout)
    expected = np.concatenate(native)
    assert expected.shape == (48, 6)
    assert report["metadata"] == "worldvln-openpi"
    assert "unknown_session: the first observation" in report["refused_first"]
    assert "bad_image: image must be uint8" in report["refused_image"]
    for actions in (report["segments"]["actions"], report["steps"], report["broker"]):
        assert np.array_equal(np.float32(actions), expected)
    assert report["segments"]["done"] == [False, False, True]
    assert report["segments"]["dtype"] == "float32"
    assert report["segments"]["prev_total_ms"] > 0
    assert [session.seen[:33] for session in policy.opened] == [list(range(33))] * 4
    assert [session.asked_with for session in policy.opened] == [[("go", "", 5)] * 3] * 4
