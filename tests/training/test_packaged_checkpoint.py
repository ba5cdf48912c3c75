"""The checkpoint that comes with the package: it loads, its recipe is the packaged one, its sizes are the preset's."""

import json

import msgspec

from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.presets import preset
from worldvln_edge.training.demo import packaged_checkpoint
from worldvln_edge.training.stages.stage_tables import STAGES, TABLES
from worldvln_edge.training.trainer.recipe import packaged_layer, read_recipe


def test_packaged_checkpoint_loads_strictly_and_is_small():
    with packaged_checkpoint() as folder:
        checkpoint = load_checkpoint(folder)
        assert checkpoint.config == preset("nano")
        assert checkpoint.tensor_file.stat().st_size < 64e6


def test_packaged_checkpoint_was_made_with_the_packaged_recipe():
    layer = packaged_layer("nano")
    assert layer is not None
    recipe = read_recipe([layer], {name: stage.config for name, stage in STAGES.items()}, TABLES)
    with packaged_checkpoint() as folder:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run.keys() == {*recipe.stages, "grpo"}
    assert run["grpo"]["config"] == json.loads(msgspec.json.encode(recipe.tables["grpo"].identity()))
    for name, stage in recipe.stages.items():
        assert run[name]["config"] == json.loads(msgspec.json.encode(stage.config)), name
        assert run[name]["optimiser"] == json.loads(msgspec.json.encode(stage.optimiser)), name
        assert (run[name]["preset"], run[name]["checkpoint"]) == ("nano", None)
