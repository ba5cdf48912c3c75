"""TensorRT engines of a bundle's graphs: ahead of time for named GPUs, or on the device itself.

`tensorrt_rtx` builds for a compute capability without a GPU; `tensorrt` builds for the GPU of this machine. Both share
one Python API. Every build runs in a process of its own, so a crash or a kill of the builder takes one engine and not
the bundle; the manifest names an engine only after its file is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType

import onnx
from onnx import external_data_helper

from worldvln_edge.bundle import Bundle, EngineEntry, file_entry
from worldvln_edge.export.build_job import AHEAD_OF_TIME, ON_DEVICE, BuildJob, EngineBuildError, Target
from worldvln_edge.export.engine_checks import CheckResult
from worldvln_edge.export.engine_records import only_writer, record_engine
from worldvln_edge.export.optimisation_profiles import Style, graph_profiles
from worldvln_edge.export.process_per_job import Died, run_each
from worldvln_edge.export.tensorrt_builder import build_engine
from worldvln_edge.runtime.engines.cuda_memory import CudaMemory
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.engines.tensorrt_library import load_tensorrt

LOCAL = "local"
_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """One graph for one target: an engine, or why there is none."""

    graph: str
    target: Target
    entry: EngineEntry | None = None
    error: str = ""
    is_kept: bool = False
    """Built before from the same files."""
    not_run: str = ""
    """Why a check did not run the engine."""


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets of `--target`: `local`, or compute capabilities such as `sm89,sm120`.

    Raises:
        EngineBuildError: unknown, or `local` among others.
        EngineError: the package that the target needs is missing.
        DeviceMemoryError: no GPU for `local`.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names == [LOCAL]:
        trt = load_tensorrt(ON_DEVICE)
        with closing(CudaMemory()) as memory:
            capability = memory.compute_capability
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
    check: Callable[[EngineEntry], CheckResult] | None = None,
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
        check: called with every engine that has no parity yet, after it was recorded; what it finds is recorded too
            (see `engine_checks.EngineChecker`).
        progress: called after every engine with (result, done, all).

    Raises:
        BundleError, ProfileError: a bundle that cannot be built from.
        EngineBuildError: an unknown graph, too little disk, or another build at work on the bundle.
    """
    bundle = Bundle.open(folder)
    names = list(graphs) if graphs else list(bundle.manifest.graphs)
    for name in names:
        bundle.graph_path(name)
    results: list[BuildResult] = []
    with only_writer(folder):
        kept, jobs_to_do = [], []
        for target in targets:
            for name in names:
                job = _job(bundle, name, target, style)
                entry = _kept_entry(bundle, job)
                if entry is not None:
                    kept.append(BuildResult(graph=name, target=target, entry=entry, is_kept=True))
                else:
                    jobs_to_do.append(job)
        _check_disk(bundle, jobs_to_do)
        count = len(kept) + len(jobs_to_do)
        for result in chain(kept, _run_jobs(jobs_to_do, jobs)):
            if result.entry is not None and not result.is_kept:
                record_engine(folder, result.entry)
            if result.entry is not None and result.entry.parity is None and check is not None:
                checked = check(result.entry)
                record_engine(folder, checked.entry)
                result = replace(result, entry=checked.entry, not_run=checked.not_run)
            results.append(result)
            if progress is not None:
                progress(results[-1], len(results), count)
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


def _kept_entry(bundle: Bundle, job: BuildJob) -> EngineEntry | None:
    for entry in bundle.manifest.engines:
        if entry.file != job.engine_file:
            continue
        path = bundle.folder / entry.file
        is_same = entry.sources == job.sources and entry.profiles == len(job.profiles)
        is_refused = entry.parity is not None and not entry.parity.within
        if is_same and not is_refused and path.is_file() and file_entry(path) == entry.content:
            return entry
    return None


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
    """Results as they come. A process of its own also makes the peak in the manifest that of one build."""
    for finished in run_each(_build_safely, jobs, parallel=parallel):
        if isinstance(finished.result, Died):
            message = (
                f"{finished.job.where}: the builder was killed or crashed (exit code {finished.result.exit_code}), "
                "most often for lack of memory; give it more, or build with --jobs 1"
            )
            yield BuildResult(graph=finished.job.graph, target=finished.job.target, error=message)
        else:
            yield finished.result


def _build_safely(job: BuildJob) -> BuildResult:
    """Runs in its own process. Errors travel as text: not every exception can be sent back."""
    try:
        return BuildResult(graph=job.graph, target=job.target, entry=build_engine(job))
    except (EngineBuildError, EngineError) as error:
        return BuildResult(graph=job.graph, target=job.target, error=str(error))
    except OSError as error:
        message = f"graph {job.graph}: the engine cannot be written ({error}); make room on the disk and build again"
        return BuildResult(graph=job.graph, target=job.target, error=message)
