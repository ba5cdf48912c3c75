"""One engine, built in this process: network, profiles, target, timing cache, file and log.

Source: TensorRT Python API; both packages share it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worldvln_edge.atomic import atomic_file
from worldvln_edge.bundle import EngineEntry, file_entry
from worldvln_edge.export.build_job import BuildJob, EngineBuildError
from worldvln_edge.export.tensorrt_network import check_formats, check_inputs_used, network_formats, parse_network
from worldvln_edge.runtime.engines.tensorrt_library import LogSpan, load_tensorrt, tensorrt_log

TIMING_CACHE = "timing.cache"


def build_engine(job: BuildJob) -> EngineEntry:
    """Build one engine in this process and write its file and log; the manifest is left to the caller.

    Raises:
        EngineBuildError: the graph does not parse or build, or the target cannot run its number formats.
        EngineError: the package is missing.
        OSError: the file cannot be written.
    """
    with tensorrt_log(job.target.package).capture() as said:
        try:
            return _build(job, said)
        finally:
            _write_log(job.bundle / job.log_file, said.messages)


def _build(job: BuildJob, said: LogSpan) -> EngineEntry:
    target, start = job.target, time.perf_counter()
    trt, logger = load_tensorrt(target.package), tensorrt_log(target.package).logger
    builder = trt.Builder(logger)
    network = parse_network(trt, builder, logger, job, said)
    formats = network_formats(trt, network)
    check_formats(formats, target, job.where)
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
            raise EngineBuildError(
                f"{job.where}: a profile does not fit ({said.first_error()}); export the bundle again"
            )
    cache = job.bundle / target.folder / TIMING_CACHE
    timing = _use_timing_cache(config, cache) if target.is_local else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineBuildError(
            f"{job.where}: {target.package} {target.version} does not build it ({said.first_error()}); see "
            f"{job.bundle / job.log_file}"
        )
    check_inputs_used(said.messages, job.where)
    with atomic_file(job.bundle / job.engine_file) as path:
        path.write_bytes(memoryview(plan))
    if timing is not None:
        with atomic_file(cache) as path:
            path.write_bytes(memoryview(timing.serialize()))
    return EngineEntry(
        graph=job.graph,
        backend=target.package,
        version=target.version,
        compute_capability=target.compute_capability,
        file=job.engine_file,
        content=file_entry(job.bundle / job.engine_file),
        precision="+".join(sorted(formats)),
        profiles=len(job.profiles),
        build_seconds=round(time.perf_counter() - start, 2),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        log=job.log_file,
        sources=job.sources,
    )


def _use_timing_cache(config: Any, path: Path) -> Any:
    """Measured kernels of earlier builds on this device; RTX measures nothing ahead of time and keeps none."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _write_log(path: Path, messages: Sequence[tuple[int, str]]) -> None:
    titles = ("internal error", "error", "warning", "info", "verbose")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{titles[severity]}: {text}\n" for severity, text in messages))
