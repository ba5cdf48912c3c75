"""The shipped model in every precision and both KV flavours: exported, compared, and built for two GPUs.

All exports share one tracer, because tracing takes most of the time. What needs a trace of its own beside fp32 and
fp16 in place is slow.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from broken_bundles import copy_one_block_scale

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.calibrate import collect
from worldvln_edge.export.calibration import Calibration
from worldvln_edge.export.exporter import export_bundle
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.parity_flights import PACKAGED_FRAMES, packaged_flights
from worldvln_edge.export.precision import CALIBRATED, PRECISIONS, Precision
from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
from worldvln_edge.export.verify import record_parity, verify_bundle
from worldvln_edge.export.world_model_graphs import KVFlavour
from worldvln_edge.models.checkpoint_source import CheckpointSource, open_any
from worldvln_edge.runtime.worldvln.graphs import ACTION_HEAD, WORLD_MODEL_STEP

NOT_RUN_ON_CPU = ("bf16", "fp8")


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    return open_any(Path(__file__).parents[2] / "worldvln_edge" / "checkpoints" / "nano")


@pytest.fixture(scope="module")
def calibration(source: CheckpointSource) -> Calibration:
    flights = packaged_flights()[:1]
    return collect(source, flights, frames_from="packaged flights")


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


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        pytest.param(name, kv, marks=pytest.mark.slow if name == "bf16" or kv == "portable" else ())
        for name in PRECISIONS
        for kv in get_args(KVFlavour)
    ],
)
def test_every_precision_passes_verify(
    export: Callable[[str, KVFlavour], Path],
    source: CheckpointSource,
    calibration: Calibration,
    name: str,
    kv: KVFlavour,
):
    report = verify_bundle(
        export(name, kv),
        source,
        count=1,
        run=name not in NOT_RUN_ON_CPU,
        calibration=calibration if name in CALIBRATED else None,
    )
    assert {row.stage: row.failures for row in report.rows if row.failures} == {}
    assert report.result == ("built, not run" if name in NOT_RUN_ON_CPU else "passed")


def test_final_actions_agree_on_eight_flights_with_eight_seeds(
    export: Callable[[str, KVFlavour], Path], source: CheckpointSource, tmp_path: Path
):
    bundle = Path(shutil.copytree(export("fp32", "inplace"), tmp_path / "bundle"))
    record_parity(bundle, verify_bundle(bundle, source, count=8, seed=40))
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity_result is not None
    assert manifest.parity_result.result == "passed"
    assert (manifest.parity_result.flights, manifest.parity_result.seed) == (8, 40)
    assert manifest.parity_result.frames == PACKAGED_FRAMES
    flight = manifest.parity["flight"]
    assert flight["segments_without_flip"] >= 8
    assert flight["action_cm"] <= flight["action_cm_bound"] < 0.01
    assert flight["action_deg"] <= flight["action_deg_bound"] < 0.01


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_one_wrong_block_of_the_trained_model_is_found(
    export: Callable[[str, KVFlavour], Path], source: CheckpointSource, tmp_path: Path, name: str
):
    bundle = Path(shutil.copytree(export(name, "inplace"), tmp_path / "bundle"))
    copy_one_block_scale(bundle)
    report = verify_bundle(bundle, source, run=False)
    assert report.result == "failed"
    assert [row.stage for row in report.rows if row.failures] == ["weights"]


@pytest.mark.parametrize("name", [pytest.param("bf16", marks=pytest.mark.slow), "fp8", "int8", "int4"])
def test_every_precision_builds(export: Callable[[str, KVFlavour], Path], name: str):
    (result,) = build_engines(export(name, "inplace"), parse_targets("sm89"), graphs=[WORLD_MODEL_STEP])
    assert result.error == ""


@pytest.mark.parametrize("kv", ["inplace", pytest.param("portable", marks=pytest.mark.slow)])
def test_engines_are_built_for_two_gpus_without_a_gpu(export: Callable[[str, KVFlavour], Path], kv: KVFlavour):
    folder = export("fp16", kv)
    results = build_engines(folder, parse_targets("sm89,sm120"), graphs=[WORLD_MODEL_STEP, ACTION_HEAD])
    assert [result.error for result in results] == [""] * 4
    engines = {(entry.graph, entry.compute_capability) for entry in Bundle.open(folder).manifest.engines}
    assert engines == {(graph, cc) for graph in (WORLD_MODEL_STEP, ACTION_HEAD) for cc in ("sm89", "sm120")}
