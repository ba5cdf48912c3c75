"""A bundle on this computer: whole, compared, and made for what is here."""

from __future__ import annotations

from pathlib import Path

from worldvln_edge.bundle import Bundle, BundleError, EngineEntry, Manifest
from worldvln_edge.runtime.doctor.finding import Finding
from worldvln_edge.runtime.doctor.gpu import Gpu
from worldvln_edge.runtime.doctor.machine import Machine
from worldvln_edge.runtime.doctor.packages import Software
from worldvln_edge.runtime.sessions.available_memory import available_bytes
from worldvln_edge.runtime.worldvln.latency_model import TUNED_FOLDER

CPU_PRECISIONS = ("fp32", "fp16", "int8", "int4")
_ROOM_FOR_A_LOAD = 1.5
"""Weights times this: what lies in memory while they are loaded."""


def check_precisions(gpu: Gpu | None, software: Software) -> Finding:
    """Precisions of bundles that run here."""
    if gpu is not None and (software.runs_on_gpu or software.tensorrt):
        device, names = gpu.name, gpu.precisions
        # numpy feeds the engines and has neither format; weights of fp8 run in engines only.
        names = tuple(name for name in names if name != "bf16" and (name != "fp8" or software.tensorrt))
    elif software.providers:
        device, names = "the CPU", CPU_PRECISIONS
    else:
        return Finding(
            check="precisions",
            state="problem",
            what="nothing here runs a bundle",
            do="install ONNX Runtime as said above",
        )
    return Finding(check="precisions", state="ok", what=f"{', '.join(names)} on {device}")


def check_bundle(folder: Path, machine: Machine, gpu: Gpu | None, software: Software) -> list[Finding]:
    """Files, parity, precision, engines, memory and measured times. Reads every file once."""
    try:
        manifest = Bundle.open(folder).manifest
    except BundleError as error:
        return [
            Finding(
                check="bundle",
                state="problem",
                what=str(error),
                do="copy the bundle to this computer once more, or export it anew",
            )
        ]
    size = sum(entry.size_bytes for entry in manifest.files.values())
    what = (
        f"{folder}: {manifest.model.name} in {manifest.precision}, {size / 1e6:,.0f} MB, every file as it was exported"
    )
    return [
        Finding(check="bundle", state="ok", what=what),
        _parity(folder, manifest),
        *_compute(manifest),
        *_engines(folder, manifest, gpu, software),
        *_room(manifest, machine),
        _tuned(folder),
    ]


def _parity(folder: Path, manifest: Manifest) -> Finding:
    result, do = manifest.parity_result, f"run `worldvln-edge verify {folder} --checkpoint ...` where the checkpoint is"
    if result is None:
        return Finding(
            check="parity", state="warning", what="never compared with its checkpoint: it may fly wrongly", do=do
        )
    if result.result == "failed":
        return Finding(
            check="parity",
            state="problem",
            what=f"differs from its checkpoint: {'; '.join(result.failures)[:300]}",
            do="do not fly it; export it anew, and verify that",
        )
    if result.result != "passed":
        return Finding(
            check="parity", state="warning", what=f"weights and structure compared only ({result.result})", do=do
        )
    return Finding(check="parity", state="ok", what=f"passed on {result.flights} flights with {result.engine}")


def _compute(manifest: Manifest) -> list[Finding]:
    if manifest.compute in ("fp32", "fp16"):
        return []
    return [
        Finding(
            check="precision",
            state="problem",
            what=f"the bundle computes in {manifest.compute}, which the runtime cannot feed",
            do="export with --compute fp16",
        )
    ]


def _engines(folder: Path, manifest: Manifest, gpu: Gpu | None, software: Software) -> list[Finding]:
    if not manifest.engines:
        if gpu is None or not software.tensorrt:
            return []
        return [
            Finding(
                check="engines",
                state="note",
                what="the bundle has no TensorRT engines",
                do=f"worldvln-edge build {folder} --target local",
            )
        ]
    if gpu is None:
        return [
            Finding(check="engines", state="note", what="built for GPUs, of which none is here; ONNX Runtime flies it")
        ]
    fitting = [entry for entry in manifest.engines if _misfit(entry, gpu, software) is None]
    graphs = {entry.graph for entry in manifest.engines}
    if {entry.graph for entry in fitting} == graphs:
        return [Finding(check="engines", state="ok", what=f"{len(graphs)} graphs have an engine for {gpu.sm}")]
    reasons = sorted({reason for entry in manifest.engines if (reason := _misfit(entry, gpu, software))})
    return [
        Finding(
            check="engines",
            state="warning",
            what=f"{len(graphs - {entry.graph for entry in fitting})} of {len(graphs)} graphs have none that fits: "
            f"{'; '.join(reasons)}",
            do=f"worldvln-edge build {folder} --target local",
        )
    ]


def _misfit(entry: EngineEntry, gpu: Gpu, software: Software) -> str | None:
    if entry.compute_capability != gpu.sm:
        return f"built for {entry.compute_capability}, here is {gpu.sm}"
    here = software.tensorrt.get(entry.backend)
    if here is None:
        return f"built by {entry.backend} {entry.version}, which does not load here"
    return None if here == entry.version else f"built by {entry.backend} {entry.version}, here is {here}"


def _room(manifest: Manifest, machine: Machine) -> list[Finding]:
    left = available_bytes(machine.root)
    weights = sum(entry.size_bytes for entry in manifest.files.values())
    if left is None or weights * _ROOM_FOR_A_LOAD <= left:
        return []
    return [
        Finding(
            check="memory",
            state="problem",
            what=f"the bundle has {weights / 1e9:.1f} GB of weights, and {left / 1e9:.1f} GB are left",
            do="export it in int8 or int4, stop other programs, or raise the container's limit",
        )
    ]


def _tuned(folder: Path) -> Finding:
    if any((folder / TUNED_FOLDER).glob("*.json")):
        return Finding(
            check="tuned", state="ok", what="its profiles were timed; `tune` again after a change of power mode"
        )
    return Finding(
        check="tuned",
        state="note",
        what="its profiles were never timed, so a deadline cannot choose one",
        do=f"worldvln-edge tune {folder}",
    )
