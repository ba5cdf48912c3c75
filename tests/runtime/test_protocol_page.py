"""docs/protocol.md: its client flies as it is printed, and its tables say what the code does."""

import re
from pathlib import Path

import msgspec
import pytest

from worldvln_edge.protocol import ERRORS, Limits
from worldvln_edge.runtime.doors.http_request import PredictRequest, _Body
from worldvln_edge.runtime.doors.openpi_codec import _Observation
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, flags=re.MULTILINE))


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows, without backticks."""
    lines = [line.strip("|").replace("`", "") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_native_client_flies_as_it_is_printed():
    (example,) = re.findall(r"```python\n(.*?)```", SECTIONS["Native WebSocket"], flags=re.DOTALL)
    assert "worldvln_edge" not in example
    with BackgroundServer(NullPolicy()) as server:
        names: dict = {}
        exec(example.replace("ws://127.0.0.1:8001/v1/session", server.url), names)
    assert len(names["flown"]) == 48
    assert server.server.manager.sessions == 0


def test_errors_are_listed_with_their_status_and_whether_to_send_again():
    listed = {row[0]: row[1:3] for row in rows(SECTIONS["Errors"])[2:]}
    expected = {code: [str(spec.http or "-"), "yes" if spec.retry else "no"] for code, spec in ERRORS.items()}
    assert listed == expected


def test_limits_are_listed_with_their_defaults():
    listed = {row[0]: float(row[1]) for row in rows(SECTIONS["Limits"])[2:]}
    assert listed == msgspec.structs.asdict(Limits())


@pytest.mark.parametrize(("title", "fields"), [("HTTP API", _Body), ("openpi WebSocket", _Observation)])
def test_every_field_that_is_read_is_documented(title, fields):
    documented = {name.strip() for row in rows(SECTIONS[title]) for name in row[0].split(",")}
    assert set(fields.__struct_encode_fields__) <= documented


def test_request_fields_of_the_page_are_read():
    text = SECTIONS["HTTP API"]
    documented = {name.strip() for row in rows(text[: text.index("Integers may")]) for name in row[0].split(",")}
    assert documented - {"request field", "---"} == set(_Body.__struct_fields__)
    assert set(PredictRequest.__dataclass_fields__) <= set(_Body.__struct_fields__)
