"""World model blocks at the released width, exported and run: 4096 channels, 32 query and 8 key heads.

Two blocks stand for thirty-six, so that it fits a small machine; everything around them is `nano`.
"""

from pathlib import Path

import msgspec
import pytest
from small_models import save_random_checkpoint

from worldvln_edge.export.exporter import export_bundle
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.precision import Precision
from worldvln_edge.export.verify import verify_bundle
from worldvln_edge.models.checkpoint_source import CheckpointSource, open_any
from worldvln_edge.presets import nano, worldvln_8b


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    config, released = nano(), worldvln_8b().world_model
    wide = msgspec.structs.replace(
        config.world_model,
        width=released.width,
        heads=released.heads,
        kv_heads=released.kv_heads,
        intermediate=released.intermediate,
        depth=2,
        block_chunks=1,
    )
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    save_random_checkpoint(folder, msgspec.structs.replace(config, world_model=wide))
    return open_any(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "fp16", "int4"])
def test_blocks_of_the_released_width_match_pytorch(
    source: CheckpointSource, tracer: GraphTracer, tmp_path: Path, name: str
):
    precision = Precision(name=name, int4_method="rtn")
    export_bundle(source, tmp_path / "bundle", precision=precision, tracer=tracer)
    report = verify_bundle(tmp_path / "bundle", source, count=1)
    assert {row.stage: row.failures for row in report.rows if row.failures} == {}
    if name == "fp32":
        world_model = next(row for row in report.rows if row.stage == "world_model")
        assert world_model.values["max_abs"] < 1e-4
