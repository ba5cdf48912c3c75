"""What the pages on serving print is what the server does."""

import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.recording.recorder import Recorder
from worldvln_edge.runtime.sessions.metrics import ServerMetrics
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

ROOT = Path(__file__).parents[2]
PRINTED_URL = "ipc:///run/worldvln/session.sock"


@pytest.fixture
def server() -> Iterator[BackgroundServer]:
    folder = tempfile.mkdtemp(prefix="zmq-")
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/s",))) as server:
        yield server
    shutil.rmtree(folder)


def example(page: str, marker: str) -> str:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = [code for code in found if PRINTED_URL in code and marker in code]
    return code


def test_asynchronous_example_of_the_readme_flies_all_segments(server: BackgroundServer):
    flown = []

    def look() -> np.ndarray:
        return np.full((8, 8, 3), 127, np.uint8)

    def fly(action: np.ndarray) -> np.ndarray:
        flown.append(action)
        return look()

    code = example("README.md", "AsyncSessionClient").replace(PRINTED_URL, server.server.zmq_urls[0])
    exec(compile(code, "README.md", "exec"), {"look": look, "fly": fly})
    assert [action.shape for action in flown] == [(6,)] * 48


def test_example_without_the_sdk_gets_a_segment(server: BackgroundServer, tmp_path: Path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    (tmp_path / "frame.jpg").write_bytes(image.getvalue())
    code = example("docs/protocol.md", "zmq.DEALER").replace(PRINTED_URL, server.server.zmq_urls[0])
    names: dict = {}
    exec(compile(code.replace("frame.jpg", str(tmp_path / "frame.jpg")), "protocol.md", "exec"), names)
    names["socket"].close(0)
    assert (names["answer"]["seg"], len(names["answer"]["actions"])) == (0, 16)


def test_table_of_metrics_names_every_metric_and_no_other(tmp_path: Path):
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    printed = set(re.findall(r"^\| `(worldvln_\w+)`", page, flags=re.MULTILINE))
    metrics, recorder = ServerMetrics(NullPolicy().info), Recorder(tmp_path, NullPolicy().info)
    metrics.watch_recorder(recorder)
    text, _ = metrics.exposition("")
    recorder.close()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text.decode(), flags=re.MULTILINE))
    assert printed == {name for name in types if not name.endswith("_created")}
