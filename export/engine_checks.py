"""Parity of the engines that fit this machine, written into the manifest.

Every engine runs in a process of its own: one that writes where it must not takes the whole CUDA context with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.bundle import Bundle, BundleError, EngineEntry
from worldvln_edge.export.build_job import EngineBuildError
from worldvln_edge.export.engine_parity import engine_parity
from worldvln_edge.export.engine_records import only_writer, record_engine
from worldvln_edge.export.parity_bounds import runs_on_cpu
from worldvln_edge.export.parity_calls import NoParityCallsError
from worldvln_edge.export.process_per_job import Died, run_each
from worldvln_edge.parity_record import EngineParity
from worldvln_edge.runtime.engines.cuda_memory import CudaMemory
from worldvln_edge.runtime.engines.device_memory import DeviceMemory, DeviceMemoryError
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.engines.tensorrt_library import load_tensorrt


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """An engine, with its parity when it was run."""

    entry: EngineEntry
    not_run: str = ""
    """Why it was not; then the entry is as it was."""

    @property
    def is_failed(self) -> bool:
        return not self.not_run and (self.entry.parity is None or not self.entry.parity.within)


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """All that a checking process needs."""

    bundle: Path
    entry: EngineEntry
    seed: int


class EngineChecker:
    """Checks engines of one bundle on the GPU of this machine.

    Args:
        folder: of the bundle; its files were checked by who opened it.
        seed: of the values that engines are run on.
    """

    def __init__(self, folder: Path, *, seed: int = 0):
        self._folder, self._seed = folder, seed
        self._capability, self._no_device = "", ""
        try:
            with closing(CudaMemory()) as memory:
                self._capability = memory.compute_capability
        except DeviceMemoryError as error:
            self._no_device = str(error)

    def check(self, entry: EngineEntry) -> CheckResult:
        """Run one engine against its graph. The manifest is left to the caller."""
        reason = self._why_not_here(entry)
        if reason:
            return CheckResult(entry=entry, not_run=reason)
        (finished,) = run_each(_check_safely, [CheckJob(bundle=self._folder, entry=entry, seed=self._seed)])
        if not isinstance(finished.result, Died):
            return finished.result
        failure = f"the process that ran it crashed (exit code {finished.result.exit_code})"
        parity = EngineParity(within=False, reference="", shapes=0, failure=failure)
        return CheckResult(entry=msgspec.structs.replace(entry, parity=parity))

    def _why_not_here(self, entry: EngineEntry) -> str:
        if self._no_device:
            return self._no_device
        try:
            version = str(load_tensorrt(entry.backend).__version__)
        except EngineError as error:
            return str(error)
        if (entry.version, entry.compute_capability) != (version, self._capability):
            return (
                f"it was built for {entry.backend} {entry.version} on {entry.compute_capability}, here is "
                f"{entry.backend} {version} on {self._capability}"
            )
        bundle = Bundle(self._folder, Bundle.open_manifest(self._folder))
        try:
            bundle.engine(
                entry.graph, backend=entry.backend, version=version, compute_capability=entry.compute_capability
            )
        except BundleError as error:  # exported again since
            return str(error)
        manifest = bundle.manifest
        if not runs_on_cpu(manifest.graphs[entry.graph].precision, manifest.compute):
            return (
                f"ONNX Runtime's CPU provider does not run {manifest.graphs[entry.graph].precision} computed in "
                f"{manifest.compute}, so there is nothing to compare with"
            )
        return ""


def _check_safely(job: CheckJob) -> CheckResult:
    """Runs in its own process."""
    try:
        with closing(CudaMemory()) as memory:
            return check_on(job, memory)
    except DeviceMemoryError as error:  # the device was there a moment ago
        return CheckResult(entry=job.entry, not_run=str(error))


def check_on(job: CheckJob, memory: DeviceMemory) -> CheckResult:
    """Run one engine against its graph in this process, on this device."""
    bundle = Bundle(job.bundle, Bundle.open_manifest(job.bundle))
    try:
        parity = engine_parity(bundle, job.entry, memory, seed=job.seed)
    except (NoParityCallsError, EngineError) as error:
        return CheckResult(entry=job.entry, not_run=" ".join(str(error).split()))
    except BundleError as error:
        parity = EngineParity(within=False, reference="", shapes=0, failure=str(error))
    return CheckResult(entry=msgspec.structs.replace(job.entry, parity=parity))


def check_engines(
    folder: Path,
    *,
    graphs: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[CheckResult, int, int], None] | None = None,
) -> list[CheckResult]:
    """Run the engines of a bundle that fit this machine, and record what came out.

    Args:
        folder: of the bundle.
        graphs: names; None checks every engine.
        seed: of the values that engines are run on.
        progress: called after every engine with (result, done, all).

    Raises:
        BundleError: an unusable bundle, or an unknown graph.
        EngineBuildError: no engines to check, or somebody else is at work on them.
    """
    bundle = Bundle.open(folder)
    for name in graphs or ():
        bundle.graph_path(name)
    entries = [entry for entry in bundle.manifest.engines if not graphs or entry.graph in graphs]
    if not entries:
        raise EngineBuildError(
            f"{folder} has no engines of {', '.join(graphs) if graphs else 'any graph'}; build some with "
            f"`worldvln-edge build {folder} --target local`"
        )
    results: list[CheckResult] = []
    with only_writer(folder):
        checker = EngineChecker(folder, seed=seed)
        for entry in entries:
            result = checker.check(entry)
            if not result.not_run:
                record_engine(folder, result.entry)
            results.append(result)
            if progress is not None:
                progress(result, len(results), len(entries))
    return results
