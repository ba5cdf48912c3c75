"""The backend that is asked for flies, the best that can flies otherwise, and one that cannot run here says why."""

import logging
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from fake_gpu import FakeMemory

from worldvln_edge.bundle import Bundle, write_manifest
from worldvln_edge.cli import main
from worldvln_edge.parity_record import EngineParity
from worldvln_edge.runtime.bench.bench import bench_bundle
from worldvln_edge.runtime.bench.bench_flight import BenchConfig
from worldvln_edge.runtime.cli import serve_command
from worldvln_edge.runtime.engines import backends
from worldvln_edge.runtime.engines.backends import BackendError
from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError
from worldvln_edge.runtime.engines.engine import EngineError, OnnxEngine
from worldvln_edge.runtime.engines.tensorrt_engine import TensorRTEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.latency_model import device_name, new_model, write_model
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

WORLD_MODEL = (graphs.WORLD_MODEL_CONTEXT, graphs.WORLD_MODEL_STEP)


def test_auto_takes_engines_that_fit_then_cuda_then_the_cpu(
    with_engines, tiny_bundle: Path, gpu: FakeMemory, request: pytest.FixtureRequest, caplog
) -> None:
    with caplog.at_level(logging.INFO, backends.__name__):
        assert load_policy(with_engines(WORLD_MODEL), backend="auto").info.backend == "tensorrt+onnx"
        assert load_policy(tiny_bundle, backend="auto").info.device == "cpu"
        request.getfixturevalue("cuda_in_onnx_runtime")
        info = load_policy(tiny_bundle, backend="auto").info
    assert (info.backend, info.device) == ("onnx", "cuda")
    first, second, third = (record.message for record in caplog.records if " flies on " in record.message)
    assert "flies on tensorrt+onnx (cuda): ONNX Runtime (cpu) runs text_encoder, latent_embed" in first
    assert first.endswith("no engines of them were built")
    assert "flies on onnx (cpu): not tensorrt: the bundle has no TensorRT engines; run `worldvln-edge build" in second
    assert "not cuda: ONNX Runtime" in second
    assert "has no CUDAExecutionProvider; install the extra gpu in the place of cpu" in second
    assert "flies on onnx (cuda): not tensorrt:" in third


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"version": "0.9"},
            r"were built for tensorrt 0\.9 on sm89, here is tensorrt 1\.0 on sm89; run `worldvln-edge",
        ),
        ({"compute_capability": "sm87"}, r"were built for tensorrt 1\.0 on sm87, here is tensorrt 1\.0 on sm89; run"),
        (
            {"parity": EngineParity(within=False, reference="", shapes=0, failure="it gave NaN")},
            r"it does not compute what the graph does \(it gave NaN\); build it again",
        ),
        ({"sources": {"weights.bin": "0" * 64}}, r"was built from another weights\.bin; run `worldvln-edge build"),
    ],
)
def test_engines_that_do_not_fit_are_not_flown(with_engines, gpu: FakeMemory, changes: dict, why: str) -> None:
    folder = with_engines(WORLD_MODEL, **changes)
    with pytest.raises(
        BackendError, match=rf"backend tensorrt cannot fly .* here: .*{why}.*; or choose --backend auto"
    ):
        load_policy(folder, backend="tensorrt")
    assert gpu.left_behind() == {}
    policy = load_policy(folder, backend="auto")
    assert (policy.info.backend, policy.info.device) == ("onnx", "cpu")
    assert re.search(f"^not tensorrt: .*{why}", policy.backend.why)


def test_an_engine_that_fails_alone_leaves_the_others_flying(with_engines, gpu: FakeMemory) -> None:
    folder = with_engines(WORLD_MODEL)
    manifest = Bundle.open(folder).manifest
    context, step = manifest.engines
    parity = EngineParity(within=False, reference="", shapes=0, failure="it gave NaN")
    refused = msgspec.structs.replace(context, parity=parity)
    write_manifest(folder, msgspec.structs.replace(manifest, engines=(refused, step)))
    policy = load_policy(folder, backend="tensorrt", threads=1)
    assert isinstance(policy.engines[graphs.WORLD_MODEL_CONTEXT], OnnxEngine)
    assert isinstance(policy.engines[graphs.WORLD_MODEL_STEP], TensorRTEngine)
    assert "engine of world_model_context: it does not compute what the graph does (it gave NaN)" in policy.backend.why


def test_backends_that_cannot_run_here_say_why(tiny_bundle: Path, with_engines, monkeypatch) -> None:
    with pytest.raises(BackendError, match="unknown backend 'gpu'; choose one of auto, cpu, cuda, tensorrt"):
        load_policy(tiny_bundle, backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(
        BackendError, match=r"backend tensorrt cannot fly .*no TensorRT engines; run `worldvln-edge buil"
    ):
        load_policy(tiny_bundle, backend="tensorrt")
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider; install the extra gpu .*--backend auto"):
        load_policy(tiny_bundle, backend="cuda")

    def no_driver() -> None:
        raise DeviceMemoryError("no CUDA driver answers here; run this on the device that has the GPU")

    monkeypatch.setattr(backends, "CudaMemory", no_driver)
    folder = with_engines(WORLD_MODEL)
    with pytest.raises(BackendError, match=r"backend tensorrt cannot fly .* here: no CUDA driver answers here"):
        load_policy(folder, backend="tensorrt")
    assert load_policy(folder, backend="auto").info.device == "cpu"


def test_bf16_is_refused_on_a_device(with_engines, gpu: FakeMemory) -> None:
    folder = with_engines(WORLD_MODEL)
    write_manifest(folder, msgspec.structs.replace(Bundle.open(folder).manifest, compute="bf16"))
    with pytest.raises(BackendError, match="numpy, which feeds the engines, has no bf16; export with --compute fp16"):
        load_policy(folder, backend="tensorrt")


def test_a_device_without_room_says_so_and_leaves_nothing(tiny_bundle, gpu, cuda_in_onnx_runtime) -> None:
    gpu.most_buffers = 0
    with pytest.raises(DeviceMemoryError, match="OUT_OF_MEMORY"):
        load_policy(tiny_bundle, backend="cuda")
    assert gpu.left_behind() == {}


def test_an_engine_that_falls_back_to_the_cpu_is_refused(tiny_bundle: Path) -> None:
    path = Bundle.open(tiny_bundle).graph_path(graphs.LATENT_EMBED)
    with (
        pytest.warns(UserWarning, match="'CUDAExecutionProvider' is not in available provider names"),
        pytest.raises(EngineError, match="CUDAExecutionProvider does not start here; install"),
    ):
        OnnxEngine(path, device="cuda")


def test_measured_times_belong_to_the_backend(tiny_bundle, tmp_path, gpu, cuda_in_onnx_runtime) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    manifest = Bundle.open(folder).manifest
    write_model(folder, new_model(manifest, device_name(), 1, ()))
    assert load_policy(folder, backend="cpu", threads=1).chooser is not None
    policy = load_policy(folder, backend="cuda", threads=1)
    assert policy.chooser is None
    assert policy.backend.machine == "Fake GPU, onnx"
    write_model(folder, new_model(manifest, policy.backend.machine, 1, ()))
    assert load_policy(folder, backend="cuda", threads=1).chooser is not None


@pytest.mark.parametrize("command", [["serve"], ["bench"], ["bench", "--against", "full-horizon"], ["tune"]])
def test_commands_fly_on_the_backend_that_they_are_given(tiny_bundle: Path, command: list[str]) -> None:
    done = CliRunner().invoke(main, [*command, str(tiny_bundle), "--backend", "cuda"])
    assert done.exit_code == 1
    assert f"backend cuda cannot fly {tiny_bundle} here: ONNX Runtime" in done.output
    assert "Traceback" not in done.output


def test_the_option_knows_every_backend() -> None:
    (option,) = (parameter for parameter in serve_command.params if parameter.name == "backend")
    assert tuple(option.type.choices) == backends.BACKENDS


def test_a_bench_on_a_device_without_a_measurable_peak_says_so(with_engines, gpu: FakeMemory) -> None:
    with pytest.raises(EngineError, match=r"best matrix product, which is not measurable: ONNX Runtime .* has no CUDA"):
        bench_bundle(with_engines(WORLD_MODEL), BenchConfig(segments=1, backend="tensorrt", threads=1))
