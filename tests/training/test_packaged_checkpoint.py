"""The checkpoint that comes with the package: it loads, its recipe is the code's, and its sizes are the preset's."""

import json
from dataclasses import asdict

from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.presets import preset
from worldvln_edge.training.demo import packaged_checkpoint
from worldvln_edge.training.stages.pipeline import Recipe


def test_packaged_checkpoint_loads_strictly_and_is_small():
    with packaged_checkpoint() as folder:
        checkpoint = load_checkpoint(folder)
        assert checkpoint.config == preset("nano")
        assert checkpoint.tensor_file.stat().st_size < 64e6


def test_packaged_checkpoint_was_made_with_the_recipe_of_this_code():
    with packaged_checkpoint() as folder:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    assert run["preset"] == "nano"
