"""A bundle is exported again exactly when something that it is made from has changed."""

import json
import shutil
from pathlib import Path

import pytest

from worldvln_edge import exporter_identity
from worldvln_edge.bundle import Bundle
from worldvln_edge.training.evaluation import bundle_source as module
from worldvln_edge.training.evaluation.bundle_source import SOURCE_FILE, ExportFailedError, bundle_source, ensure_bundle


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def exports(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Checkpoints that were exported; the export itself, which takes long, is a copy of one that was made before."""
    exported: list[Path] = []

    def export(checkpoint: Path, bundle: Path) -> None:
        exported.append(checkpoint)
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(tiny_bundle, bundle)

    monkeypatch.setattr(module, "export_bundle", export)
    return exported


def test_a_bundle_is_kept_while_nothing_changes(checkpoint: Path, exports: list[Path], tmp_path: Path):
    for words in ("a card\n", "the same card with numbers\n"):
        (checkpoint / "README.md").write_text(words)
        ensure_bundle(checkpoint, tmp_path / "bundle")
    assert exports == [checkpoint]
    assert json.loads((tmp_path / "bundle" / SOURCE_FILE).read_text(encoding="utf-8")) == bundle_source(checkpoint)
    Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "label_stats.json", "model.safetensors"])
def test_a_change_of_any_file_of_the_checkpoint_exports_again(
    checkpoint: Path, exports: list[Path], tmp_path: Path, name: str
):
    ensure_bundle(checkpoint, tmp_path / "bundle")
    with (checkpoint / name).open("ab") as file:
        file.write(b"\n")
    ensure_bundle(checkpoint, tmp_path / "bundle")
    assert len(exports) == 2


def test_another_exporter_exports_again(
    checkpoint: Path, exports: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ensure_bundle(checkpoint, tmp_path / "bundle")
    monkeypatch.setattr(module, "code_sha256", lambda: "ab" * 32)
    ensure_bundle(checkpoint, tmp_path / "bundle")
    assert len(exports) == 2
    monkeypatch.setattr(exporter_identity.metadata, "version", lambda name: "99")
    ensure_bundle(checkpoint, tmp_path / "bundle")
    assert len(exports) == 3


def test_a_bundle_that_is_broken_or_was_put_there_by_others_is_exported_again(
    checkpoint: Path, exports: list[Path], tiny_bundle: Path, tmp_path: Path
):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    ensure_bundle(checkpoint, bundle)
    assert len(exports) == 1
    (bundle / "weights.bin").write_bytes(b"")
    ensure_bundle(checkpoint, bundle)
    assert len(exports) == 2
    (bundle / SOURCE_FILE).write_text("{")
    ensure_bundle(checkpoint, bundle)
    assert len(exports) == 3


def test_the_code_that_exports_is_part_of_the_source(checkpoint: Path):
    source = bundle_source(checkpoint)
    assert set(source["checkpoint"]) == {path.name for path in checkpoint.iterdir()}
    assert source["packages"]["torch"]
    assert source["code"] == exporter_identity.code_sha256()


def test_an_export_that_fails_is_an_error_and_leaves_no_bundle(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with pytest.raises(ExportFailedError, match=r"the export of .* ended with status 1"):
        ensure_bundle(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
