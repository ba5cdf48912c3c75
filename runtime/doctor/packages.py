"""Python and the packages that run graphs: do they load, and does the GPU answer them?

Libraries are tried in a Python of their own: one that crashes on import is a finding, not the end of the examination.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from worldvln_edge.runtime.doctor.finding import Finding
from worldvln_edge.runtime.doctor.gpu import DRIVER_OF_CUDA, Gpu
from worldvln_edge.runtime.doctor.machine import Answer, Machine

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_OLDEST_ORT = (1, 25)
_SERVER_MODULES = ("starlette", "uvicorn", "prometheus_client", "zmq")

_VERSIONS = """
import importlib.metadata, json, platform
names = ["onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tokenizers", "starlette", "uvicorn",
         "prometheus-client", "pyzmq", "torch"]
found = {}
for name in names:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"python": platform.python_version(), "packages": found}))
"""
_RUNTIME = """
import json, onnxruntime
print(json.dumps({"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}))
"""
_CUDA_TRIAL = """
import numpy
from worldvln_edge.runtime.bench.machine_peak import matmul_run
matmul_run(64, numpy.dtype(numpy.float16), threads=0, device="cuda")()
print("ran")
"""


@dataclass(frozen=True, kw_only=True)
class Software:
    """What graphs can run on here."""

    providers: tuple[str, ...] = ()
    """Of ONNX Runtime; empty where it does not load."""
    runs_on_gpu: bool = False
    """A product of two matrices came back from the GPU through ONNX Runtime."""
    tensorrt: dict[str, str] = field(default_factory=dict)
    """`tensorrt`, `tensorrt_rtx` -> version, where they load."""


def examine_packages(machine: Machine, gpu: Gpu | None) -> tuple[Software, list[Finding]]:
    """Versions, ONNX Runtime, TensorRT, and what the server needs."""
    said = _json(machine, _VERSIONS)
    if said is None:
        problem = Finding(
            check="python",
            state="problem",
            what="Python does not start a second time here",
            do="look at free memory and at limits of processes (`ulimit -u`)",
        )
        return Software(), [problem]
    packages: dict[str, str] = said["packages"]
    findings = [Finding(check="python", state="ok", what=f"Python {said['python']}")]
    providers, of_runtime = _onnx_runtime(machine, packages)
    runs_on_gpu, of_cuda = _cuda(machine, gpu, providers)
    tensorrt, of_tensorrt = _tensorrt(machine, gpu, packages)
    findings += [*of_runtime, *of_cuda, *of_tensorrt, *_server(packages), *_torch(packages)]
    return Software(providers=providers, runs_on_gpu=runs_on_gpu, tensorrt=tensorrt), findings


def _onnx_runtime(machine: Machine, packages: dict[str, str]) -> tuple[tuple[str, ...], list[Finding]]:
    def problem(what: str, do: str) -> list[Finding]:
        return [Finding(check="onnx runtime", state="problem", what=what, do=do)]

    both = "onnxruntime" in packages and "onnxruntime-gpu" in packages
    said = _json(machine, _RUNTIME)
    if both:
        return tuple(said["providers"]) if said else (), problem(
            "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the extra cpu or the extra gpu alone",
        )
    if said is None:
        if not packages.keys() & {"onnxruntime", "onnxruntime-gpu"}:
            return (), problem("not installed", "pip install 'worldvln-edge[cpu]', or [gpu] with an NVIDIA GPU")
        return (), problem(
            f"installed, but does not load: {_last_line(machine, _RUNTIME)}",
            "install it again for this Python and this processor: pip install --force-reinstall --no-deps "
            + ("onnxruntime-gpu" if "onnxruntime-gpu" in packages else "onnxruntime"),
        )
    version, providers = said["version"], tuple(said["providers"])
    what = f"{version} with {', '.join(provider.removesuffix('ExecutionProvider') for provider in providers)}"
    if _numbers(version) < _OLDEST_ORT:
        oldest = ".".join(map(str, _OLDEST_ORT))
        return providers, problem(
            f"{what}; graphs of opset 24 need {oldest}", f"pip install --upgrade 'onnxruntime>={oldest}'"
        )
    return providers, [Finding(check="onnx runtime", state="ok", what=what)]


def _cuda(machine: Machine, gpu: Gpu | None, providers: tuple[str, ...]) -> tuple[bool, list[Finding]]:
    if gpu is None:
        return False, []
    if _CUDA not in providers and gpu.is_jetson:
        # No wheel of ONNX Runtime with CUDA is published for Jetson modules; engines need none.
        return False, [Finding(check="cuda", state="note", what="graphs without a TensorRT engine run on the CPU")]
    if _CUDA not in providers:
        finding = Finding(
            check="cuda",
            state="warning",
            what="ONNX Runtime here has no CUDA: graphs without an engine run on the CPU",
            do="pip uninstall -y onnxruntime, then pip install 'worldvln-edge[gpu]'",
        )
        return False, [finding]
    answer = machine.ask_python(_CUDA_TRIAL)
    if answer is not None and answer.code == 0 and answer.output.endswith("ran"):
        return True, [Finding(check="cuda", state="ok", what="ONNX Runtime computes on the GPU")]
    reason = "no answer within a minute" if answer is None else _end_of(answer)
    newest = max(DRIVER_OF_CUDA)
    finding = Finding(
        check="cuda",
        state="problem",
        what=f"ONNX Runtime does not compute on the GPU: {reason}",
        do=f"its CUDA major version has to fit the driver (CUDA {newest}: driver {DRIVER_OF_CUDA[newest]}), and cuDNN "
        "9 has to be there: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )
    return False, [finding]


def _tensorrt(machine: Machine, gpu: Gpu | None, packages: dict[str, str]) -> tuple[dict[str, str], list[Finding]]:
    found: dict[str, str] = {}
    findings = []
    for package in ("tensorrt", "tensorrt_rtx"):
        said = _json(machine, f"import json, {package}; print(json.dumps({{'version': {package}.__version__}}))")
        if said is not None:
            found[package] = said["version"]
            findings.append(Finding(check=package, state="ok", what=said["version"]))
        elif package.replace("_", "-") in packages:
            finding = Finding(
                check=package,
                state="warning",
                what=f"installed, but does not load: {_last_line(machine, f'import {package}')}",
                do=f"pip install --force-reinstall {package.replace('_', '-')}; on a Jetson take JetPack's",
            )
            findings.append(finding)
    if gpu is not None and gpu.is_jetson and "tensorrt" not in found:
        findings.append(
            Finding(
                check="tensorrt",
                state="warning",
                what="JetPack's TensorRT is not to be seen from this Python: the GPU stays idle",
                do="sudo apt install nvidia-jetpack, and make the virtual environment with --system-site-packages",
            )
        )
    elif gpu is not None and not found:
        findings.append(
            Finding(
                check="tensorrt",
                state="note",
                what="not installed: graphs run on ONNX Runtime",
                do="pip install 'worldvln-edge[tensorrt]' (GeForce and RTX cards: [tensorrt-rtx])",
            )
        )
    return found, findings


def _server(packages: dict[str, str]) -> list[Finding]:
    names = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "zmq": "pyzmq"}
    missing = [names[module] for module in _SERVER_MODULES if names[module] not in packages]
    if missing:
        return [
            Finding(
                check="server",
                state="warning",
                what=f"`worldvln-edge serve` misses {', '.join(missing)}",
                do="pip install 'worldvln-edge[serve]'",
            )
        ]
    return [Finding(check="server", state="ok", what="its packages are there")]


def _torch(packages: dict[str, str]) -> list[Finding]:
    if "torch" not in packages:
        return []
    what = f"PyTorch {packages['torch']} is installed; flying does not need it"
    return [Finding(check="torch", state="note", what=what)]


def _json(machine: Machine, code: str) -> dict[str, Any] | None:
    answer = machine.ask_python(code)
    if answer is None or answer.code != 0:
        return None
    try:
        return msgspec.json.decode(answer.output.splitlines()[-1], type=dict[str, Any])
    except (msgspec.DecodeError, IndexError):
        return None


def _last_line(machine: Machine, code: str) -> str:
    answer = machine.ask_python(code)
    return "no answer" if answer is None else _end_of(answer)


def _end_of(answer: Answer) -> str:
    """What a program said last; a crash says nothing."""
    return answer.output.splitlines()[-1][:200] if answer.output else f"it ended with status {answer.code}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
