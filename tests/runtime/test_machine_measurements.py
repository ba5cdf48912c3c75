"""What the machine can do, and what the board says it took."""

import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from worldvln_edge.runtime.bench.energy import find_energy_meter
from worldvln_edge.runtime.bench.machine_peak import matmul_model, measure_peak
from worldvln_edge.runtime.sessions.process_memory import resident_bytes


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_graph_of_the_peak_is_a_matrix_product(dtype):
    session = ort.InferenceSession(matmul_model(300, np.dtype(dtype)), providers=["CPUExecutionProvider"])
    a, b = np.random.default_rng(0).standard_normal((2, 300, 300)).astype(dtype) / 8
    product = session.run(None, {"a": a, "b": b})[0]
    np.testing.assert_allclose(product, a.astype(np.float64) @ b, atol=1e-4 if dtype == np.float32 else 1e-1)


def test_peak_is_that_of_the_best_run():
    peak = measure_peak(threads=1, size=128, copy_mib=8, seconds=0.0)
    assert (peak.matmul_size, peak.matmul_dtype) == (128, "float32")
    assert 1e8 < peak.matmul_flops < 1e15
    assert 1e7 < peak.copy_bytes < 1e14


def test_graph_of_the_peak_is_understood_by_the_onnx_checker():
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(matmul_model(4096, np.dtype(np.float16))), full_check=True)


def test_resident_memory_is_known_on_linux():
    assert resident_bytes("VmRSS") is None or 1e6 < resident_bytes("VmRSS") <= resident_bytes("VmHWM")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_energy_of_processor_packages_is_counted_also_over_the_turn_of_a_counter(tmp_path):
    zones = tmp_path / "sys/class/powercap"
    for zone, name in {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core"}.items():
        write(zones / zone / "name", name)
        write(zones / zone / "energy_uj", "9000000")
        write(zones / zone / "max_energy_range_uj", "10000000")
    meter = find_energy_meter(tmp_path)
    assert meter.source == "RAPL, 2 processor packages"
    meter.start()
    write(zones / "intel-rapl:0" / "energy_uj", "9500000")
    write(zones / "intel-rapl:1" / "energy_uj", "1000000")
    assert meter.stop() == pytest.approx(0.5 + 2.0)


def test_power_of_a_jetson_is_integrated(tmp_path):
    sensor = tmp_path / "sys/class/hwmon/hwmon3"
    for channel, label in {1: "VDD_CPU_GPU_CV", 2: "VDD_IN"}.items():
        write(sensor / f"in{channel}_label", label)
        write(sensor / f"in{channel}_input", "5000")
        write(sensor / f"curr{channel}_input", str(1000 * channel))
    meter = find_energy_meter(tmp_path)
    assert meter.source == "INA3221, VDD_IN"
    start = time.perf_counter()
    meter.start()
    time.sleep(0.12)
    joules = meter.stop()
    assert joules == pytest.approx(10 * (time.perf_counter() - start), rel=0.3)


def test_board_that_tells_nothing_has_no_meter(tmp_path):
    assert find_energy_meter(tmp_path) is None
    write(tmp_path / "sys/class/powercap/intel-rapl:0/name", "package-0")  # its counter may not be read
    assert find_energy_meter(tmp_path) is None
