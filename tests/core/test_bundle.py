"""A bundle is flown whole and unchanged, or refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from worldvln_edge import bundle as bundle_module
from worldvln_edge.action_windows import LabelStats
from worldvln_edge.bundle import (
    SCHEMA,
    Bundle,
    BundleError,
    GraphEntry,
    Manifest,
    TensorSpec,
    file_entry,
    write_manifest,
)
from worldvln_edge.presets import nano

STATS = LabelStats(mean_angles=(0, 0, 0), std_angles=(1, 1, 1), mean_t=(0, 0, 0), std_t=(1, 1, 1))


def make_bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / "net.onnx").write_bytes(b"graph" * 1000)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 20)
    spec = TensorSpec(name="x", dtype="float32", shape=(1, "frames"))
    manifest = Manifest(
        schema=SCHEMA,
        created_by="test",
        checkpoint_sha256="0" * 64,
        precision="fp32",
        compute="fp32",
        kv_flavour="inplace",
        model=nano(),
        guidance_rows=2,
        kv_capacity=100,
        latent_head_stats=STATS,
        rgb_head_stats=STATS,
        graphs={"net": GraphEntry(file="net.onnx", opset=24, precision="fp32", inputs=(spec,), outputs=(spec,))},
        files={name: file_entry(folder / name) for name in ("net.onnx", "weights.bin")},
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_bundle_opens_as_it_was_written(folder: Path):
    bundle = Bundle.open(folder)
    assert bundle.manifest.model == nano()
    assert bundle.graph_path("net") == folder / "net.onnx"
    assert bundle.file_path("weights.bin") == folder / "weights.bin"
    assert bundle.size_bytes == 5000 + 5120


def test_one_flipped_bit_is_found(folder: Path):
    data = bytearray((folder / "weights.bin").read_bytes())
    data[4321] ^= 1
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin is corrupt.*copy the bundle again"):
        Bundle.open(folder)


def test_truncated_file_is_found(folder: Path):
    (folder / "net.onnx").write_bytes(b"graph")
    with pytest.raises(BundleError, match=r"net\.onnx is corrupt: 5 bytes .* 5000 bytes"):
        Bundle.open(folder)


def test_missing_file_is_named(folder: Path):
    (folder / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        Bundle.open(folder)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: path.write_text("a file")])
def test_folder_without_manifest_is_no_bundle(tmp_path: Path, make):
    make(tmp_path / "other")
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.open(tmp_path / "other")


@pytest.mark.parametrize("keep", [0, 1, 100, -20])
def test_truncated_manifest_is_refused(folder: Path, keep: int):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"manifest\.json: not JSON"):
        Bundle.open(folder)


@pytest.mark.parametrize("content", ["[]", '"text"', "3"])
def test_manifest_that_is_no_object_is_refused(folder: Path, content: str):
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(folder)


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, "1", None])
def test_other_schema_says_both_versions(folder: Path, schema):
    change_manifest(folder, lambda content: content.update(schema=schema))
    with pytest.raises(BundleError, match=f"schema {schema} found, this version reads {SCHEMA}"):
        Bundle.open(folder)


def test_model_that_cannot_work_is_refused(folder: Path):
    change_manifest(folder, lambda content: content["model"].update(image_hw=[65, 64]))
    with pytest.raises(BundleError, match=r"not a manifest .*image_hw"):
        Bundle.open(folder)


def test_statistics_that_are_no_numbers_are_refused(folder: Path):
    change_manifest(folder, lambda content: content["latent_head_stats"].update(std_t=[1, -1, 1]))
    with pytest.raises(BundleError, match=r"not a manifest .*std_t must be 3 finite numbers"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/net.onnx", "..", ".", ""])
def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, name: str):
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "net.onnx").write_bytes(b"graph" * 1000)

    def add(content: dict) -> None:
        content["files"][name] = {"sha256": file_entry(folder / "net.onnx").sha256, "size_bytes": 5000}
        content["graphs"]["net"]["file"] = name

    change_manifest(folder, add)
    with pytest.raises(BundleError, match="not a plain file name"):
        Bundle.open(folder)


def test_link_out_of_the_folder_must_have_the_right_content(folder: Path):
    (folder / "weights.bin").unlink()
    (folder.parent / "elsewhere").write_bytes(b"other")
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BundleError, match="corrupt"):
        Bundle.open(folder)


def test_graph_without_a_hash_is_refused(folder: Path):
    change_manifest(folder, lambda content: content["files"].pop("net.onnx"))
    with pytest.raises(BundleError, match=r"net\.onnx has no hash"):
        Bundle.open(folder)


def test_unknown_graph_lists_the_known_ones(folder: Path):
    with pytest.raises(BundleError, match=r"no graph 'pixels' \(it has net\)"):
        Bundle.open(folder).graph_path("pixels")


def test_file_that_the_manifest_does_not_name_is_not_given_out(folder: Path):
    (folder / "extra.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"extra\.json is not in the manifest"):
        Bundle.open(folder).file_path("extra.json")


def test_hash_reads_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 10)
    whole = file_entry(path)
    monkeypatch.setattr(bundle_module, "_BLOCK_BYTES", 7)
    assert file_entry(path) == whole


def test_manifest_is_replaced_in_one_rename(folder: Path):
    manifest = Bundle.open(folder).manifest
    write_manifest(folder, msgspec.structs.replace(manifest, parity={"actions": {"max_cm": 0.001}}))
    assert Bundle.open(folder).manifest.parity == {"actions": {"max_cm": 0.001}}
    assert not list(folder.glob(".*"))
