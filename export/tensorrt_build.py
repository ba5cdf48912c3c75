"""TensorRT engines of a bundle's graphs: ahead of time for named GPUs, or on the device itself.

`tensorrt_rtx` builds for a compute capability without a GPU; `tensorrt` builds for the GPU of this machine. Both share
one Python API, and the network is always strongly typed, so precision is what the graph says and nothing else.

TensorRT's ONNX parser (RTX 1.7, checked) drops the input of `Attention` that says how much of the KV cache is valid:
the engine would attend to stale entries and say nothing. `_restore_kv_lengths` puts it back, and an input that the
builder reports as unused fails the build.

Every build runs in a process of its own, so a crash or a kill of the builder takes one engine and not the bundle; the
manifest names an engine only after its file is complete.

Source: design of the graphs in runtime/graphs.py; ONNX opset 24 `Attention`, input 7.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import onnx
from onnx import external_data_helper

from worldvln_edge.atomic import atomic_file
from worldvln_edge.bundle import ENGINES_FOLDER, Bundle, EngineEntry, file_entry, write_manifest
from worldvln_edge.export.optimisation_profiles import Profile, Style, graph_profiles
from worldvln_edge.runtime.device_memory import CudaMemory
from worldvln_edge.runtime.engine import EngineError
from worldvln_edge.runtime.tensorrt_engine import load_tensorrt, tensorrt_log

LOCAL = "local"
AHEAD_OF_TIME = "tensorrt_rtx"
ON_DEVICE = "tensorrt"
TIMING_CACHE = "timing.cache"
_MARGIN_BYTES = 64 << 20
_KV_LENGTH_INPUT = 6
_UNUSED_INPUT = re.compile(r"Unused Input: (\S+)")

_ONE_BUILD_A_PROCESS: dict[str, Any] = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}

LEAST_CAPABILITY = {"fp16": 75, "int8": 75, "fp32": 80, "bf16": 80, "int4": 80, "fp8": 89}
"""Number format -> first compute capability whose GPUs multiply it; what RTX 1.7 accepts when it is asked to build."""


class EngineBuildError(RuntimeError):
    """An engine that cannot be built. The message says what was found, what was expected and what to do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of GPU and the package that builds for it."""

    package: str
    version: str
    compute_capability: str
    is_local: bool

    @property
    def folder(self) -> str:
        return f"{ENGINES_FOLDER}/{self.package}-{self.version}/{self.compute_capability}"


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """All that a building process needs."""

    bundle: Path
    graph: str
    file: str
    profiles: tuple[Profile, ...]
    target: Target
    sources: dict[str, str]
    """Bundle file -> sha256 of what goes into the engine."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """One graph for one target: an engine, or why there is none."""

    graph: str
    target: Target
    entry: EngineEntry | None = None
    error: str = ""
    is_kept: bool = False
    """Built before from the same files."""


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets of `--target`: `local`, or compute capabilities such as `sm89,sm120`.

    Raises:
        EngineBuildError: unknown, or `local` among others, or no GPU for `local`.
        EngineError: the package that the target needs is missing.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names == [LOCAL]:
        trt = load_tensorrt(ON_DEVICE)
        capability = CudaMemory().compute_capability
        return (Target(package=ON_DEVICE, version=trt.__version__, compute_capability=capability, is_local=True),)
    if not names or LOCAL in names:
        raise EngineBuildError(f"--target is {text!r}; give `local` alone, or compute capabilities such as sm89,sm120")
    trt = load_tensorrt(AHEAD_OF_TIME)
    known = _known_capabilities(trt)
    for name in names:
        if name not in known:
            raise EngineBuildError(
                f"unknown target {name!r}; tensorrt_rtx {trt.__version__} builds ahead of time for "
                f"{', '.join(known)}, and for any other GPU run `worldvln-edge build --target local` on the device"
            )
    return tuple(
        Target(package=AHEAD_OF_TIME, version=trt.__version__, compute_capability=name, is_local=False)
        for name in dict.fromkeys(names)
    )


def _known_capabilities(trt: ModuleType) -> list[str]:
    names = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted(names, key=lambda name: int(name[2:]))


def build_engines(
    folder: Path,
    targets: Sequence[Target],
    *,
    graphs: Sequence[str] | None = None,
    jobs: int = 1,
    style: Style = "exact",
    progress: Callable[[BuildResult, int, int], None] | None = None,
) -> list[BuildResult]:
    """Build what is missing and record it in the manifest, engine by engine.

    A graph that does not build does not stop the others. Engines that were built from the same files are kept, so a
    build that was killed goes on where it stopped.

    Args:
        folder: of the bundle.
        targets: see `parse_targets`.
        graphs: names; None builds every graph of the bundle.
        jobs: builds at once; each needs the memory of one (see the manifest's `peak_memory_bytes`).
        style: of the profiles, see `optimisation_profiles`.
        progress: called after every engine with (result, done, all).

    Raises:
        BundleError, ProfileError: a bundle that cannot be built from.
        EngineBuildError: an unknown graph, too little disk, or another build at work on the bundle.
    """
    bundle = Bundle.open(folder)
    names = list(graphs) if graphs else list(bundle.manifest.graphs)
    for name in names:
        bundle.graph_path(name)
    with _only_build(folder):
        results, jobs_to_do = [], []
        for target in targets:
            for name in names:
                job = _job(bundle, name, target, style)
                kept = _kept_entry(bundle, job)
                if kept is not None:
                    results.append(BuildResult(graph=name, target=target, entry=kept, is_kept=True))
                else:
                    jobs_to_do.append(job)
        _check_disk(bundle, jobs_to_do)
        count = len(results) + len(jobs_to_do)
        for done, result in enumerate(results, 1):
            if progress is not None:
                progress(result, done, count)
        for result in _run_jobs(jobs_to_do, jobs):
            if result.entry is not None:
                _record(folder, result.entry)
            results.append(result)
            if progress is not None:
                progress(result, len(results), count)
    return results


def _job(bundle: Bundle, graph: str, target: Target, style: Style) -> BuildJob:
    manifest = bundle.manifest
    profiles = graph_profiles(graph, manifest.graphs[graph], manifest.model, rows=manifest.guidance_rows, style=style)
    return BuildJob(
        bundle=bundle.folder.resolve(),
        graph=graph,
        file=manifest.graphs[graph].file,
        profiles=profiles,
        target=target,
        sources=_sources(bundle, graph),
    )


@contextmanager
def _only_build(folder: Path) -> Iterator[None]:
    """Two builds would overwrite each other's manifest."""
    lock = folder / ENGINES_FOLDER / ".lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EngineBuildError(
                f"{folder}: another build is at work on this bundle; wait until it is done"
            ) from error
        yield


def _kept_entry(bundle: Bundle, job: BuildJob) -> EngineEntry | None:
    for entry in bundle.manifest.engines:
        same_place = entry.file == _engine_file(job)
        path = bundle.folder / entry.file
        if same_place and entry.sources == job.sources and entry.profiles == len(job.profiles) and path.is_file():
            return entry if file_entry(path) == entry.content else None
    return None


def _engine_file(job: BuildJob) -> str:
    return f"{job.target.folder}/{job.graph}.engine"


def _weight_files(path: Path) -> dict[str, int]:
    """External weight files of a graph -> bytes it takes from them."""
    sizes: dict[str, int] = {}
    for tensor in onnx.load_model(path, load_external_data=False).graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            info = external_data_helper.ExternalDataInfo(tensor)
            sizes[info.location] = sizes.get(info.location, 0) + int(info.length or 0)
    return sizes


def _sources(bundle: Bundle, graph: str) -> dict[str, str]:
    path = bundle.graph_path(graph)
    return {name: bundle.manifest.files[name].sha256 for name in sorted([path.name, *_weight_files(path)])}


def _check_disk(bundle: Bundle, jobs: Sequence[BuildJob]) -> None:
    """An engine holds its graph's weights again, and kernels."""
    needed = sum(sum(_weight_files(bundle.graph_path(job.graph)).values()) + _MARGIN_BYTES for job in jobs)
    free = shutil.disk_usage(bundle.folder).free
    if free < needed:
        raise EngineBuildError(
            f"{bundle.folder}: {len(jobs)} engines need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make room, or build fewer graphs with --graphs"
        )


def _run_jobs(jobs: Sequence[BuildJob], parallel: int) -> Iterator[BuildResult]:
    """Results as they come. Processes are spawned: forked ones would inherit locks of threads that are not there."""
    waiting = list(jobs)
    context = multiprocessing.get_context("spawn")
    while waiting:
        broken: list[BuildJob] = []
        # One process a build: memory goes back at its end, and the peak in the manifest is its own.
        with ProcessPoolExecutor(min(parallel, len(waiting)), context, **_ONE_BUILD_A_PROCESS) as pool:
            futures: dict[Future[BuildResult], BuildJob] = {pool.submit(_build_safely, job): job for job in waiting}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    broken.append(futures[future])
        if len(waiting) == 1 or parallel == 1:
            # The pool ran in order, so the first one that is missing is the one that died; the others start again.
            waiting = sorted(broken, key=list(jobs).index)
            if waiting:
                yield _died(waiting.pop(0))
        else:
            # Any of several may have died: they are tried again one by one, which shows who.
            waiting, parallel = broken, 1


def _died(job: BuildJob) -> BuildResult:
    message = (
        f"graph {job.graph} for {job.target.compute_capability}: the builder was killed or crashed, most often for "
        "lack of memory; give it more, or build with --jobs 1"
    )
    return BuildResult(graph=job.graph, target=job.target, error=message)


def _build_safely(job: BuildJob) -> BuildResult:
    """Runs in its own process. Errors travel as text: not every exception can be sent back."""
    try:
        return BuildResult(graph=job.graph, target=job.target, entry=build_engine(job))
    except (EngineBuildError, EngineError) as error:
        return BuildResult(graph=job.graph, target=job.target, error=str(error))
    except OSError as error:
        message = f"graph {job.graph}: the engine cannot be written ({error}); make room on the disk and build again"
        return BuildResult(graph=job.graph, target=job.target, error=message)


def build_engine(job: BuildJob) -> EngineEntry:
    """Build one engine in this process and write its file and log; the manifest is left to the caller.

    Raises:
        EngineBuildError: the graph does not parse or build, or the target cannot run its number formats.
        EngineError: the package is missing.
        OSError: the file cannot be written.
    """
    target, start = job.target, time.perf_counter()
    trt, log = load_tensorrt(target.package), tensorrt_log(target.package)
    log.clear()
    where = f"graph {job.graph} for {target.compute_capability}"
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(job.bundle / job.file)):
        reason = parser.get_error(0).desc() if parser.num_errors else log.first_error()
        raise EngineBuildError(
            f"{where}: {target.package} {target.version} does not parse it ({reason}); export the bundle again, with "
            "--kv portable for TensorRT 10"
        )
    _prepare_attention(trt, network, job, where)
    formats = network_formats(trt, network)
    _check_formats(formats, target, where)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 in the graph means fp32: heads and guidance are there on purpose
    if not target.is_local:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.compute_capability.upper()), 0)
    for profile in job.profiles:
        shapes = builder.create_optimization_profile()
        for name, span in profile.items():
            shapes.set_shape(name, span.lowest, span.best, span.highest)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineBuildError(f"{where}: a profile does not fit ({log.first_error()}); export the bundle again")
    cache = job.bundle / target.folder / TIMING_CACHE
    timing = _use_timing_cache(config, cache) if target.is_local else None
    plan = builder.build_serialized_network(network, config)
    log_file = f"{target.folder}/{job.graph}.log"
    _write_log(job.bundle / log_file, log.messages)
    if plan is None:
        raise EngineBuildError(
            f"{where}: {target.package} {target.version} does not build it ({log.first_error()}); see "
            f"{job.bundle / log_file}"
        )
    _check_inputs_used(log.messages, where)
    file = _engine_file(job)
    with atomic_file(job.bundle / file) as path:
        path.write_bytes(memoryview(plan))
    if timing is not None:
        with atomic_file(cache) as path:
            path.write_bytes(memoryview(timing.serialize()))
    return EngineEntry(
        graph=job.graph,
        backend=target.package,
        version=target.version,
        compute_capability=target.compute_capability,
        file=file,
        content=file_entry(job.bundle / file),
        precision="+".join(sorted(formats)),
        profiles=len(job.profiles),
        build_seconds=round(time.perf_counter() - start, 2),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        log=log_file,
        sources=job.sources,
    )


def _network_flags(trt: ModuleType) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other network
    return 0 if flag is None else 1 << int(flag)


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _prepare_attention(trt: ModuleType, network: Any, job: BuildJob, where: str) -> None:
    """Attention over the cache gets its lengths back and must run fused; any other may fall apart into plain layers.

    A fused kernel for fp32 does not exist. Unfused attention over the cache would also build, and materialise scores
    against the whole capacity at every step; nobody wants to fly that, so it is refused.
    """
    lengths = _kv_lengths(job.bundle / job.file)
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    attentions = {layer.name.removesuffix("_AttentionInput"): layer for layer in _layers(network) if layer.type == kind}
    for node in lengths:
        if node not in attentions:
            raise EngineBuildError(
                f"{where}: {job.target.package} {job.target.version} parses {node} into no attention layer; export the "
                "bundle again with --kv portable"
            )
    casts: dict[str, Any] = {}
    for name, layer in attentions.items():
        layer.__class__ = trt.IAttentionInputLayer  # the binding hands out the base class
        attention = layer.attention
        if name not in lengths:
            attention.decomposable = True
        elif layer.get_input(0).dtype == trt.DataType.FLOAT:
            raise EngineBuildError(
                f"{where}: attention over the KV cache is fp32 here and TensorRT's kernels for it are fp16 and bf16; "
                "export the bundle with --precision fp16 or bf16"
            )
        elif not hasattr(attention, "key_value_lengths"):
            raise EngineBuildError(
                f"{where}: {job.target.package} {job.target.version} attends over the whole cache only; export the "
                "bundle again with --kv portable"
            )
        else:
            attention.key_value_lengths = _restore_kv_lengths(trt, network, lengths[name], casts, where)


def _kv_lengths(path: Path) -> dict[str, str]:
    """Attention nodes with a valid length -> name of that tensor."""
    nodes = onnx.load_model(path, load_external_data=False).graph.node
    return {
        node.name: node.input[_KV_LENGTH_INPUT]
        for node in nodes
        if node.op_type == "Attention" and len(node.input) > _KV_LENGTH_INPUT and node.input[_KV_LENGTH_INPUT]
    }


def _restore_kv_lengths(trt: ModuleType, network: Any, name: str, casts: dict[str, Any], where: str) -> Any:
    """The int32 lengths that TensorRT wants, of the ONNX tensor `name`."""
    if name not in casts:
        inputs = (network.get_input(index) for index in range(network.num_inputs))
        source = next((tensor for tensor in inputs if tensor.name == name), None)
        if source is None:
            raise EngineBuildError(
                f"{where}: the valid length {name} is no input of the graph; export the bundle again"
            )
        casts[name] = network.add_cast(source, trt.DataType.INT32).get_output(0)
    return casts[name]


def network_formats(trt: ModuleType, network: Any) -> set[str]:
    """Number formats of a parsed network's tensors: fp32 counts where it is multiplied or nothing else is there."""
    names = {
        getattr(trt.DataType, kind, None): name
        for kind, name in (
            ("FLOAT", "fp32"),
            ("HALF", "fp16"),
            ("BF16", "bf16"),
            ("INT8", "int8"),
            ("INT4", "int4"),
            ("FP8", "fp8"),
        )
    }
    products = {trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION}
    found, multiplied = set(), set()
    for layer in _layers(network):
        formats = {names.get(layer.get_output(index).dtype) for index in range(layer.num_outputs)} - {None}
        found |= formats
        if layer.type in products:
            multiplied |= formats
    if "fp32" not in multiplied and found - {"fp32"}:
        found.discard("fp32")
    return found


def _check_formats(formats: set[str], target: Target, where: str) -> None:
    capability = int(target.compute_capability.removeprefix("sm"))
    for name in sorted(formats):
        if capability < LEAST_CAPABILITY[name]:
            possible = [other for other, least in LEAST_CAPABILITY.items() if least <= capability]
            raise EngineBuildError(
                f"{where}: the graph computes in {name}, which needs sm{LEAST_CAPABILITY[name]} or newer; export the "
                f"bundle with --precision {' or '.join(possible) if possible else 'fp16'}, or choose another target"
            )


def _use_timing_cache(config: Any, path: Path) -> Any:
    """Measured kernels of earlier builds on this device; RTX measures nothing ahead of time and keeps none."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _check_inputs_used(messages: Sequence[tuple[int, str]], where: str) -> None:
    unused = [match.group(1) for _, text in messages if (match := _UNUSED_INPUT.search(text))]
    if unused:
        raise EngineBuildError(
            f"{where}: the builder does not use input {unused[0]}, so the engine would compute something else than the "
            "graph; export the bundle again with --kv portable"
        )


def _write_log(path: Path, messages: Sequence[tuple[int, str]]) -> None:
    titles = ("internal error", "error", "warning", "info", "verbose")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{titles[severity]}: {text}\n" for severity, text in messages))


def _record(folder: Path, entry: EngineEntry) -> None:
    """Put an engine into the manifest as it is now; one of the same place goes."""
    manifest = Bundle.open_manifest(folder)
    others = tuple(other for other in manifest.engines if other.file != entry.file)
    engines = tuple(sorted((*others, entry), key=lambda engine: engine.file))
    write_manifest(folder, msgspec.structs.replace(manifest, engines=engines))
