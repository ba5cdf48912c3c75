"""The shipped model in every precision and both KV flavours: exported, compared, and built for two GPUs.

All exports share one tracer, because tracing takes most of the time.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.calibrate import collect
from worldvln_edge.export.calibration import Calibration
from worldvln_edge.export.exporter import export_bundle
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.parity_flights import packaged_flights
from worldvln_edge.export.precision import PRECISIONS, Precision
from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
from worldvln_edge.export.verify import verify_bundle
from worldvln_edge.export.world_model_graphs import KVFlavour
from worldvln_edge.models.checkpoint_source import CheckpointSource, load_source, open_any
from worldvln_edge.runtime.graphs import ACTION_HEAD, WORLD_MODEL_STEP

NOT_RUN_ON_CPU = ("bf16", "fp8")


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    return open_any(Path(__file__).parents[2] / "worldvln_edge" / "checkpoints" / "nano")


@pytest.fixture(scope="module")
def calibration(source: CheckpointSource) -> Calibration:
    flights = packaged_flights()[:1]
    return collect(load_source(source), flights, checkpoint_sha256=source.fingerprint(), source="packaged flights")


@pytest.fixture(scope="module")
def export(
    source: CheckpointSource,
    calibration: Calibration,
    tracer: GraphTracer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, KVFlavour], Path]:
    root = tmp_path_factory.mktemp("shipped")

    def make(name: str, kv: KVFlavour) -> Path:
        folder = root / f"{name}-{kv}"
        if not folder.exists():
            precision = Precision(name=name)
            export_bundle(source, folder, precision=precision, kv=kv, calibration=calibration, tracer=tracer)
        return folder

    return make


@pytest.mark.parametrize("kv", ["inplace", "portable"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_passes_verify(
    export: Callable[[str, KVFlavour], Path], source: CheckpointSource, name: str, kv: KVFlavour
):
    report = verify_bundle(export(name, kv), source, count=2, run=name not in NOT_RUN_ON_CPU)
    assert {row.stage: row.failures for row in report.rows if row.failures} == {}
    assert report.result == ("built, not run" if name in NOT_RUN_ON_CPU else "passed")


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4"])
def test_every_precision_builds(export: Callable[[str, KVFlavour], Path], name: str):
    (result,) = build_engines(export(name, "inplace"), parse_targets("sm89"), graphs=[WORLD_MODEL_STEP])
    assert result.error == ""


@pytest.mark.parametrize("kv", ["inplace", "portable"])
def test_engines_are_built_for_two_gpus_without_a_gpu(export: Callable[[str, KVFlavour], Path], kv: KVFlavour):
    folder = export("fp16", kv)
    results = build_engines(folder, parse_targets("sm89,sm120"), graphs=[WORLD_MODEL_STEP, ACTION_HEAD])
    assert [result.error for result in results] == [""] * 4
    engines = {(entry.graph, entry.compute_capability) for entry in Bundle.open(folder).manifest.engines}
    assert engines == {(graph, cc) for graph in (WORLD_MODEL_STEP, ACTION_HEAD) for cc in ("sm89", "sm120")}
