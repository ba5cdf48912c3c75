"""The README's client examples run as they are printed."""

import io
import re
from pathlib import Path

from PIL import Image

from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

README = Path(__file__).parents[2] / "README.md"


def run_example(url: str, served_at: str, **names: object) -> dict:
    """Names after the example that uses a URL was run against a server."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [example for example in examples if f'"{url}' in example]
    exec(compile(example.replace(url, served_at), str(README), "exec"), names)
    return names


def test_client_example_flies_all_segments():
    with BackgroundServer(NullPolicy()) as server:
        names = run_example("ws://127.0.0.1:8001", server.url)
    assert names["answer"].done
    assert names["answer"].actions.shape == (16, 6)


def test_http_example_flies_all_segments():
    image, flown = io.BytesIO(), []
    Image.new("RGB", (8, 8)).save(image, "JPEG")

    def fly(action: list[float]) -> bytes:
        flown.append(action)
        return image.getvalue()

    with BackgroundServer(NullPolicy()) as server:
        names = run_example("http://127.0.0.1:8001", server.server.http_url, look=image.getvalue, fly=fly)
    assert names["answer"]["segment_index"] == 2
    assert [len(action) for action in flown] == [6] * 48
