"""The README's client example runs as it is printed."""

import re
from pathlib import Path

from worldvln_edge.runtime.null_policy import NullPolicy
from worldvln_edge.runtime.server import BackgroundServer

README = Path(__file__).parents[2] / "README.md"
DOCUMENTED_URL = "ws://127.0.0.1:8001"


def test_client_example_flies_all_segments():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert DOCUMENTED_URL in example
    with BackgroundServer(NullPolicy()) as server:
        names: dict = {}
        exec(compile(example.replace(DOCUMENTED_URL, server.url), str(README), "exec"), names)
    assert names["answer"].done
    assert names["answer"].actions.shape == (16, 6)
