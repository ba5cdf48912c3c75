"""Bundle: the folder that export writes and the runtime flies. `manifest.json` says what every file is.

A bundle holds ONNX graphs, their weights, the tokenizer and the manifest. Nothing is loaded that the manifest does not
name, and every file is checked against its sha256 before it is used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ModelConfig

SCHEMA = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
_BLOCK_BYTES = 1 << 20


class BundleError(ValueError):
    """A bundle that cannot be flown. The message says what was found, what was expected and what to do."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A graph's input or output; a dimension is a number, or a name where it varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    size_bytes: int


class GraphEntry(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    opset: int
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is made of and made from."""

    schema: int
    created_by: str
    """Program and version that wrote the bundle."""
    checkpoint_sha256: str
    """Of the checkpoint's tensor file."""
    precision: str
    model: ModelConfig
    guidance_rows: int
    """Rows of the KV cache: 2 (instruction and unconditional), or 1 without guidance."""
    kv_capacity: int
    """Entries of the KV cache, fixed in the graphs."""
    latent_head_stats: LabelStats
    rgb_head_stats: LabelStats
    graphs: dict[str, GraphEntry]
    files: dict[str, FileEntry]
    parity: dict[str, dict[str, float]] = {}
    """Stage -> measure -> value, as `worldvln-edge verify` printed it."""


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` in one rename, so that a reader sees the old one or the new one."""
    temporary = folder / f".{MANIFEST_FILE}.new"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    temporary.replace(folder / MANIFEST_FILE)


class Bundle:
    """A checked bundle folder."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read the manifest and check every file it names.

        Raises:
            BundleError: no manifest, another schema version, a missing file, or a file whose hash differs.
        """
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise BundleError(
                f"{folder} is no bundle: {MANIFEST_FILE} is missing; make one with `worldvln-edge export`"
            )
        manifest = _parse_manifest(path)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        for graph in manifest.graphs.values():
            if graph.file not in manifest.files:
                raise BundleError(f"{path}: graph file {graph.file} has no hash; export the bundle again")
        return cls(folder, manifest)

    def file_path(self, name: str) -> Path:
        """A checked file. Raises BundleError when the manifest does not name it."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: {name} is not in the manifest; export the bundle again")
        return self.folder / name

    def graph_path(self, graph: str) -> Path:
        """File of a graph. Raises BundleError when the bundle has no such graph."""
        if graph not in self.manifest.graphs:
            raise BundleError(
                f"{self.folder} has no graph {graph!r} (it has {', '.join(sorted(self.manifest.graphs))}); "
                "export the bundle again with this version"
            )
        return self.file_path(self.manifest.graphs[graph].file)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.manifest.files.values())


def _parse_manifest(path: Path) -> Manifest:
    data = path.read_bytes()
    try:
        schema = msgspec.json.decode(data, type=dict).get("schema")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not JSON ({error}); export the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(f"{path}: schema {schema} found, this version reads {SCHEMA}; export the bundle again")
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BundleError(f"{path}: not a manifest ({error}); export the bundle again") from error


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    if not name or Path(name).name != name or name == "..":
        raise BundleError(f"{folder}: {name!r} is not a plain file name; export the bundle again")
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{folder}: file {name} is missing; copy the bundle again or export it again")
    found = file_entry(path)
    if found != entry:
        raise BundleError(
            f"{path} is corrupt: {found.size_bytes} bytes with sha256 {found.sha256[:12]} found, the manifest says "
            f"{entry.size_bytes} bytes with {entry.sha256[:12]}; copy the bundle again or export it again"
        )
