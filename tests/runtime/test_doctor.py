"""The doctor: this computer, a good one, and broken ones, each with the advice that mends it."""

import json
import shutil
import socket
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from computers import Computer, jetson, plain_computer

from worldvln_edge.bundle import MANIFEST_FILE, Bundle, EngineEntry, FileEntry, ParityResult, write_manifest
from worldvln_edge.cli import main
from worldvln_edge.runtime.doctor.bundle_checks import check_bundle
from worldvln_edge.runtime.doctor.examination import examine
from worldvln_edge.runtime.doctor.finding import Finding, Report, report_of, report_text
from worldvln_edge.runtime.doctor.gpu import Gpu, find_gpu
from worldvln_edge.runtime.doctor.machine import Machine
from worldvln_edge.runtime.doctor.network_checks import check_clock, check_port
from worldvln_edge.runtime.doctor.packages import Software, _onnx_runtime
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

_ORIN = Gpu(name="Orin", compute_capability=(8, 7))
_RTX = "NVIDIA GeForce RTX 4090, 580.82.07, 24564, 24000, 8.9"


def by_check(report: Report) -> dict[str, Finding]:
    return {finding.check: finding for finding in report.findings}


def advice(report: Report) -> dict[str, str]:
    """Check -> what to do, of warnings and problems."""
    return {each.check: each.do for each in report.findings if each.state in ("warning", "problem")}


def test_this_computer_flies_a_bundle(tiny_bundle: Path):
    result = CliRunner().invoke(main, ["doctor", str(tiny_bundle), "--port", "127.0.0.1:0", "--json"])
    report = msgspec.json.decode(result.stdout, type=Report)
    found = by_check(report)
    assert result.exit_code == 0
    assert "CPU" in found["onnx runtime"].what
    assert found["precisions"].what == "fp32, fp16, int8, int4 on the CPU"
    assert found["bundle"].state == "ok"
    assert json.loads(result.stdout)["result"] == report.result != "problem"


def test_jetson_fresh_from_the_card(tmp_path: Path):
    computer = jetson(tmp_path)
    computer.onnx_runtime("1.31.0", "CPUExecutionProvider")
    report = examine(machine=computer.machine, addresses=())
    told = advice(report)
    assert report.result == "warning"
    assert "sudo nvpmodel -m 2` (MAXN_SUPER)" in told["power mode"]
    assert "jetson_clocks" in told["gpu clock"]
    assert "cool down" in told["temperature"]
    assert "set-ntp" in told["clock"]
    assert "--system-site-packages" in told["tensorrt"]
    assert by_check(report)["gpu"].what == "NVIDIA Jetson Orin Nano Developer Kit, Jetson Linux 39.4.3 (sm87)"


def test_desktop_with_a_driver_that_was_updated_and_two_builds_of_onnx_runtime(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.program("nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch", code=18)
    computer.onnx_runtime("1.31.0", "CUDAExecutionProvider", "CPUExecutionProvider")
    computer.distribution("onnxruntime", "1.31.0")
    computer.distribution("onnxruntime-gpu", "1.31.0")
    report = examine(machine=computer.machine, addresses=())
    told = advice(report)
    assert report.result == "problem"
    assert told["gpu"].startswith("restart the computer")
    assert "uninstall -y onnxruntime onnxruntime-gpu" in told["onnx runtime"]


def test_small_container_whose_onnx_runtime_does_not_load_and_whose_port_is_taken(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.file("/proc/self/cgroup", "0::/\n")
    computer.file("/sys/fs/cgroup/memory.max", "536870912")
    computer.file("/sys/fs/cgroup/memory.current", "100000000")
    computer.module("onnxruntime", "raise ImportError('libc.so.6: version GLIBC_2.38 not found')")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = examine(machine=computer.machine, addresses=(("127.0.0.1", port),))
    told = advice(report)
    assert report.result == "problem"
    assert "container's limit" in told["memory"]
    assert "--force-reinstall --no-deps onnxruntime" in told["onnx runtime"]
    assert "GLIBC_2.38" in by_check(report)["onnx runtime"].what
    assert f"sport = :{port}" in told[f"port {port}"]
    assert by_check(report)["precisions"].what == "nothing here runs a bundle"


def test_server_that_runs_already_is_not_to_be_stopped():
    with BackgroundServer(NullPolicy()) as server:
        finding = check_port("127.0.0.1", server.server.http_port)
    assert finding.state == "note"
    assert "a policy server listens" in finding.what


def test_trial_that_crashes_without_a_word_is_a_problem(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.program("nvidia-smi", _RTX)
    computer.module(
        "onnxruntime",
        "import os\n__version__ = '1.31.0'\n"
        "def get_available_providers(): return ['CUDAExecutionProvider']\n"
        "def __getattr__(name): os._exit(3)\n",
    )
    report = examine(machine=computer.machine, addresses=())
    assert by_check(report)["cuda"].state == "problem"
    assert "it ended with status 3" in by_check(report)["cuda"].what


def test_gpu_build_that_does_not_load_is_not_mended_with_the_other_one(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.module("onnxruntime", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    providers, (finding,) = _onnx_runtime(computer.machine, {"onnxruntime-gpu": "1.31.0"})
    assert providers == ()
    assert finding.do.endswith(" onnxruntime-gpu")


def test_nvidia_smi_that_does_not_answer_is_not_taken_for_a_missing_driver(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.program("nvidia-smi", _RTX)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/nothing/that/runs\n")
    gpu, (finding,) = find_gpu(computer.machine)
    assert gpu is None
    assert finding.what == "nvidia-smi does not answer"


def test_gpu_that_onnx_runtime_does_not_reach_is_a_problem(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.program("nvidia-smi", _RTX)
    computer.onnx_runtime("1.31.0", "CUDAExecutionProvider", "CPUExecutionProvider")
    report = examine(machine=computer.machine, addresses=())
    assert by_check(report)["gpu"].what == "NVIDIA GeForce RTX 4090 (sm89, 25.8 GB), driver 580.82.07"
    assert "driver 580" in advice(report)["cuda"]


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        ("NVIDIA A10, 470.57.02, 22731, 22000, 8.6", "problem", "too old for CUDA 12"),
        ("NVIDIA H200, 580.95, 143771, 143000, 9.0", "ok", "sm90"),
    ],
)
def test_drivers(tmp_path: Path, line: str, state: str, words: str):
    computer = plain_computer(tmp_path)
    computer.program("nvidia-smi", line)
    (finding,) = find_gpu(computer.machine)[1]
    assert (finding.state, words in finding.what) == (state, True)


def test_card_without_a_driver(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.file("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    computer.file("/sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    gpu, (finding,) = find_gpu(computer.machine)
    assert gpu is None
    assert "install the NVIDIA driver" in finding.do


@pytest.mark.parametrize(
    ("model", "release", "sm", "state"),
    [
        ("NVIDIA Jetson AGX Orin", 39, "sm87", "ok"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 38, "sm110", "ok"),
        ("NVIDIA Jetson AGX Orin", 36, "sm87", "warning"),
        ("NVIDIA Jetson Xavier NX", 35, "sm72", "warning"),
    ],
)
def test_jetsons(tmp_path: Path, model: str, release: int, sm: str, state: str):
    gpu, (finding,) = find_gpu(jetson(tmp_path, model=model, release=release).machine)
    assert gpu is not None
    assert (gpu.sm, finding.state) == (sm, state)


def test_jetson_at_its_best_has_nothing_to_say_about_power(tmp_path: Path):
    computer = jetson(tmp_path)
    computer.program("nvpmodel", "NV Power Mode: MAXN_SUPER\n2")
    computer.file("/sys/class/devfreq/17000000.gpu/min_freq", "1020000000")
    computer.file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    found = by_check(examine(machine=computer.machine, addresses=()))
    assert [found[check].state for check in ("power mode", "gpu clock", "processor")] == ["ok"] * 3


@pytest.mark.parametrize(
    ("program", "output", "state"),
    [
        ("timedatectl", "yes", "ok"),
        ("timedatectl", "no", "warning"),
        ("chronyc", "A29FC87B,time,3,1795000000.1,0.000123,0.0,0.0,-7.2,0.0,0.0,0.01,0.0,64.2,Normal", "ok"),
        ("chronyc", "A29FC87B,time,3,1795000000.1,12.5,0.0,0.0,-7.2,0.0,0.0,0.01,0.0,64.2,Normal", "warning"),
        ("chronyc", "00000000,,0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,1.0,0.0,Not synchronised", "warning"),
    ],
)
def test_clocks(tmp_path: Path, program: str, output: str, state: str):
    computer = Computer(tmp_path)
    computer.program(program, output)
    assert check_clock(computer.machine).state == state


def test_clock_that_nobody_knows_of_is_no_reproach(tmp_path: Path):
    assert check_clock(Computer(tmp_path).machine).state == "note"


def test_address_of_another_computer_is_no_port_of_this_one():
    finding = check_port("192.0.2.1", 8001)
    assert finding.state == "problem"
    assert "ip address" in finding.do


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def findings_of(bundle: Path, *, gpu: Gpu | None = None, software: Software | None = None) -> dict[str, Finding]:
    found = check_bundle(bundle, Machine(), gpu, software or Software(providers=("CPUExecutionProvider",)))
    return {finding.check: finding for finding in found}


def change_manifest(bundle: Path, **changes: object) -> None:
    write_manifest(bundle, msgspec.structs.replace(Bundle.open_manifest(bundle), **changes))


def test_bundle_that_lost_a_byte_is_a_problem(own_bundle: Path):
    graph = Bundle.open(own_bundle).graph_path("world_model_step")
    graph.write_bytes(graph.read_bytes()[:-1])
    assert findings_of(own_bundle)["bundle"].state == "problem"


def test_folder_that_is_no_bundle_is_a_problem(tmp_path: Path):
    finding = findings_of(tmp_path)["bundle"]
    assert MANIFEST_FILE in finding.what


@pytest.mark.parametrize(
    ("result", "state"), [(None, "warning"), ("passed", "ok"), ("failed", "problem"), ("built, not run", "warning")]
)
def test_parity_is_asked_for(own_bundle: Path, result: str | None, state: str):
    parity = result and ParityResult(result=result, engine="onnxruntime", flights=2, seed=0, frames="noise")
    change_manifest(own_bundle, parity_result=parity)
    assert findings_of(own_bundle)["parity"].state == state


def test_bundle_that_computes_in_bf16_is_a_problem(own_bundle: Path):
    change_manifest(own_bundle, compute="bf16")
    assert "--compute fp16" in findings_of(own_bundle)["precision"].do


@pytest.mark.parametrize(
    ("sm", "version", "installed", "words"),
    [
        ("sm87", "10.7.0", {"tensorrt": "10.7.0"}, None),
        ("sm89", "10.7.0", {"tensorrt": "10.7.0"}, "built for sm89, here is sm87"),
        ("sm87", "10.3.0", {"tensorrt": "10.7.0"}, "built by tensorrt 10.3.0, here is 10.7.0"),
        ("sm87", "10.7.0", {}, "built by tensorrt 10.7.0, which does not load here"),
    ],
)
def test_engines_that_do_not_fit_are_named(
    own_bundle: Path, sm: str, version: str, installed: dict[str, str], words: str | None
):
    (own_bundle / "step.engine").write_bytes(b"engine")
    entry = EngineEntry(
        graph="world_model_step",
        backend="tensorrt",
        version=version,
        compute_capability=sm,
        file="step.engine",
        content=FileEntry(sha256="", size_bytes=6),
        precision="fp16",
        profiles=0,
        build_seconds=1.0,
        peak_memory_bytes=1,
        log="",
        sources={},
    )
    change_manifest(own_bundle, engines=(entry,))
    finding = findings_of(own_bundle, gpu=_ORIN, software=Software(tensorrt=installed))["engines"]
    assert (finding.state, words is None or words in finding.what) == ("ok" if words is None else "warning", True)
    assert words is None or finding.do == f"worldvln-edge build {own_bundle} --target local"


def test_bundle_larger_than_what_is_left_is_a_problem(own_bundle: Path, tmp_path: Path):
    computer = plain_computer(tmp_path / "small")
    computer.file("/proc/meminfo", "MemAvailable: 100 kB\n")
    found = {each.check: each for each in check_bundle(own_bundle, computer.machine, None, Software())}
    assert found["memory"].state == "problem"


def test_program_that_crashes_python_is_a_finding(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.module("onnxruntime", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    computer.distribution("onnxruntime", "1.31.0")
    report = examine(machine=computer.machine, addresses=())
    assert by_check(report)["onnx runtime"].state == "problem"


def test_old_onnx_runtime_is_a_problem(tmp_path: Path):
    computer = plain_computer(tmp_path)
    computer.onnx_runtime("1.20.1", "CPUExecutionProvider")
    assert "onnxruntime>=1.25" in advice(examine(machine=computer.machine, addresses=()))["onnx runtime"]


def test_warning_without_advice_is_refused():
    with pytest.raises(ValueError, match="has to say what to do"):
        Finding(check="gpu", state="warning", what="odd")


def test_text_counts_and_indents():
    findings = [
        Finding(check="gpu", state="problem", what="none", do="buy one"),
        Finding(check="memory", state="ok", what="much"),
    ]
    assert report_text(report_of(findings)).splitlines() == [
        " X  gpu     none",
        "            -> buy one",
        "ok  memory  much",
        "",
        "1 problem, no warnings",
    ]


def test_problem_ends_the_command_with_1(tmp_path: Path):
    result = CliRunner().invoke(main, ["doctor", str(tmp_path), "--port", "127.0.0.1:0"])
    assert result.exit_code == 1
    assert "export it anew" in result.stdout


def test_python_is_named():
    found = by_check(examine(addresses=()))
    assert found["python"].what == "Python {}.{}.{}".format(*sys.version_info[:3])
