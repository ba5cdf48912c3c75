"""Bundle: the folder that export writes and the runtime flies. `manifest.json` says what every file is.

A bundle holds ONNX graphs, their weights, the tokenizer and the manifest. Nothing is loaded that the manifest does not
name, and every file is checked against its sha256 before it is used. `worldvln-edge build` adds engines below
`engines/`, for one package version and one kind of GPU each; an engine is checked when it is asked for, so that a
bundle with engines for many devices opens as fast as one without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ModelConfig
from worldvln_edge.parity_record import EngineParity

SCHEMA = 3
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
ENGINES_FOLDER = "engines"
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


class CastLoss(msgspec.Struct, frozen=True, kw_only=True):
    """What a weight lost when it was stored in a narrower dtype."""

    tensor: str
    dtype: str
    flushed: int
    """Values other than zero that became zero."""
    largest: float
    """Largest absolute value."""


class CalibrationEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranges of activations were measured on."""

    source: str
    """Folder or simulator command that the frames come from."""
    flights: int
    frames: int
    sha256: str
    """Of the calibration file."""


class EngineEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One graph built for one package version and one kind of GPU."""

    graph: str
    backend: str
    """Python package that built it and runs it: `tensorrt` or `tensorrt_rtx`."""
    version: str
    """Of that package; engines run in the very version that built them."""
    compute_capability: str
    """The GPU: `sm89`."""
    file: str
    """Below the bundle folder, with forward slashes."""
    content: FileEntry
    precision: str
    """Number formats of the network, as the builder saw them: `fp16+fp32`."""
    profiles: int
    """Optimisation profiles; 0 when all shapes are fixed."""
    build_seconds: float
    peak_memory_bytes: int
    """Highest resident memory of the building process."""
    log: str
    """The builder's messages, a file below the bundle folder."""
    sources: dict[str, str]
    """Bundle file -> sha256: the graph and the weights that went into the engine."""
    parity: EngineParity | None = None
    """None: built, not run."""


class ParityResult(msgspec.Struct, frozen=True, kw_only=True):
    """How the last `worldvln-edge verify` ended."""

    result: str
    """`passed`, `failed`, or `built, not run`: weights and structure are right, but the graphs were not run (bf16 and
    fp8 do not run on the CPU; or `--no-run`)."""
    engine: str
    """What ran the graphs: `onnxruntime 1.31.0 CPUExecutionProvider`; empty where nothing did."""
    flights: int
    """Whole flights that were compared, each with its own seed."""
    seed: int
    """Of the first flight."""
    frames: str
    """Where the frames come from."""
    failures: tuple[str, ...] = ()
    """`stage: reason`."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is made of and made from."""

    schema: int
    created_by: str
    """Program and version that wrote the bundle."""
    checkpoint_sha256: str
    """Of all files the checkpoint was read from."""
    precision: str
    compute: str
    """Dtype of activations and of weights that are not quantised: fp32, fp16 or bf16."""
    kv_flavour: str
    """How the graphs write and read the KV cache: `inplace` or `portable`."""
    model: ModelConfig
    guidance_rows: int
    """Rows of the KV cache: 2 (instruction and unconditional), or 1 without guidance."""
    kv_capacity: int
    """Entries of the KV cache, fixed in the graphs."""
    latent_head_stats: LabelStats | None
    """None: the head's outputs are rad and m."""
    rgb_head_stats: LabelStats | None
    graphs: dict[str, GraphEntry]
    files: dict[str, FileEntry]
    calibration: CalibrationEntry | None = None
    cast_losses: tuple[CastLoss, ...] = ()
    parity: dict[str, dict[str, float]] = {}
    """Stage -> measure -> value, as `worldvln-edge verify` printed it."""
    parity_result: ParityResult | None = None
    """None: not compared with its checkpoint yet."""
    engines: tuple[EngineEntry, ...] = ()
    """What `worldvln-edge build` made of the graphs."""


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
        path, manifest = folder / MANIFEST_FILE, cls.open_manifest(folder)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        for graph in manifest.graphs.values():
            if graph.file not in manifest.files:
                raise BundleError(f"{path}: graph file {graph.file} has no hash; export the bundle again")
        return cls(folder, manifest)

    @staticmethod
    def open_manifest(folder: Path) -> Manifest:
        """The manifest alone, without a look at the files. Raises BundleError when it is missing or unreadable."""
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            raise BundleError(
                f"{folder} is no bundle: {MANIFEST_FILE} is missing; make one with `worldvln-edge export`"
            )
        return _parse_manifest(path)

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

    def engine(self, graph: str, *, backend: str, version: str, compute_capability: str) -> EngineEntry:
        """The engine of a graph that runs here.

        Raises:
            BundleError: there is none for this package, version and GPU, or the graph was exported again since.
        """
        found = [entry for entry in self.manifest.engines if entry.graph == graph]
        again = (
            f"run `worldvln-edge build {self.folder} --target {compute_capability}` (or `--target local` on the device)"
        )
        for entry in found:
            if (entry.backend, entry.version, entry.compute_capability) != (backend, version, compute_capability):
                continue
            for name, sha256 in entry.sources.items():
                if name not in self.manifest.files or self.manifest.files[name].sha256 != sha256:
                    raise BundleError(f"{self.folder}: {entry.file} was built from another {name}; {again}")
            return entry
        built = ", ".join(sorted({f"{e.backend} {e.version} on {e.compute_capability}" for e in found})) or "nothing"
        raise BundleError(
            f"{self.folder}: the engines of {graph} were built for {built}, here is {backend} {version} on "
            f"{compute_capability}; {again}"
        )

    def engine_path(self, entry: EngineEntry) -> Path:
        """File of an engine, checked now. Raises BundleError when it is missing or corrupt."""
        _check_file(self.folder, entry.file, entry.content, below=ENGINES_FOLDER)
        return self.folder / entry.file

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


def _check_file(folder: Path, name: str, entry: FileEntry, *, below: str = "") -> None:
    parts = name.split("/")
    if below and (parts[0] != below or len(parts) < 2):
        raise BundleError(f"{folder}: {name!r} does not lie below {below}/; build the engines again")
    plain = parts if below else [name]
    if any(not part or Path(part).name != part or part == ".." for part in plain):
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
