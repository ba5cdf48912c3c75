"""The client examples of README and quickstart run as they are printed."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def run_example(url: str, served_at: str, *, page: Path = README, **names: object) -> dict:
    """Names after the example that uses a URL was run against a server."""
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [example for example in examples if f'"{url}' in example]
    exec(compile(example.replace(url, served_at), str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "quickstart.md"], ids=lambda page: page.name)
def test_client_example_flies_all_segments(page: Path):
    with BackgroundServer(NullPolicy()) as server:
        names = run_example("ws://127.0.0.1:8001", server.url, page=page)
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
