"""What exports is another exporter as soon as a line of its code or a version of its packages changes."""

from pathlib import Path

import pytest

from worldvln_edge import exporter_identity as module
from worldvln_edge.exporter_identity import EXPORTER_ROOMS, code_sha256, exporter_identity, package_versions


def test_every_room_that_exports_counts():
    assert {"worldvln_edge.export", "worldvln_edge.models"} <= set(EXPORTER_ROOMS)
    assert len({code_sha256((room,)) for room in EXPORTER_ROOMS}) == len(EXPORTER_ROOMS)
    assert package_versions()["numpy"]
    assert package_versions(("no-such-package",)) == {"no-such-package": None}


def test_a_line_of_code_makes_another_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    room = tmp_path / "room_of_the_test"
    room.mkdir()
    (room / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    before = code_sha256(("room_of_the_test",))
    (room / "graph.py").write_text("OPSET = 25\n")
    assert code_sha256(("room_of_the_test",)) != before


def test_another_package_makes_another_exporter(monkeypatch: pytest.MonkeyPatch):
    before = exporter_identity()
    monkeypatch.setattr(module.metadata, "version", lambda name: "99")
    assert exporter_identity() == before  # a process goes on with what it has imported
    exporter_identity.cache_clear()
    try:
        assert exporter_identity() != before
    finally:
        exporter_identity.cache_clear()
