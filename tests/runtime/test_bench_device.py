"""`worldvln-edge bench --device`: graphs one at a time, at the shapes of a flight. The CPU stands in for the GPU."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.runtime.bench.bench_device import bench_device, why_not_measurable
from worldvln_edge.runtime.bench.bench_flight import synthetic_frames
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.engines.engine_meter import EngineMeter
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy


def test_every_graph_of_a_segment_is_timed_as_often_as_it_is_called(tiny_bundle: Path):
    report = bench_device(tiny_bundle, device="cpu", runs=1, peak_size=64)
    assert (report.model, report.precision, report.segment) == ("tiny", "fp32", 2)
    policy = load_policy(tiny_bundle, threads=1)
    meter = EngineMeter.around(policy)
    session, frames = policy.new_session("fly to the red tower"), synthetic_frames((16, 24), 9, 0)
    for observed, point in ((0, 1), (1, 5), (5, 9)):
        session.observe(frames[observed:point])
        steps = meter.take().steps
    timed = [call for call in report.calls if call.stage == graphs.WORLD_MODEL_STEP]
    assert [(call.tokens, call.calls) for call in timed] == [
        (tokens, sum(t * h * w == tokens for t, h, w in (step.thw for step in steps)))
        for tokens in sorted({step.thw[0] * step.thw[1] * step.thw[2] for step in steps})
    ]
    assert set(report.stages_ms) == {
        "vae_encoder_next",
        graphs.WORLD_MODEL_CONTEXT,
        graphs.WORLD_MODEL_STEP,
        "vae_decoder_next",
        graphs.ACTION_ADAPTER,
        graphs.ACTION_HEAD,
    }
    assert report.segment_ms == pytest.approx(sum(call.calls * call.call_ms for call in report.calls))
    assert all((call.flops is None) == (call.tokens == 0) for call in report.calls)


@pytest.mark.skipif(why_not_measurable() is None, reason="a CUDA device is here")
def test_machine_without_a_gpu_is_told_what_is_missing(tiny_bundle: Path):
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider|nvidia-smi"):
        bench_device(tiny_bundle)
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), "--device", "cuda"])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_schedules_are_compared_on_the_cpu_only(tiny_bundle: Path):
    options = ["--device", "cuda", "--against", "full-horizon"]
    assert CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *options]).exit_code == 2


@pytest.mark.gpu
@pytest.mark.skipif(why_not_measurable() is not None, reason="no CUDA device, or ONNX Runtime without CUDA")
def test_graphs_run_on_a_gpu(tiny_bundle: Path):
    report = bench_device(tiny_bundle, runs=2, peak_size=1024)
    assert "CUDA" in report.runner
    assert report.segment_ms > 0
