"""Recipes: layers, strict keys, and messages that say where a value came from."""

from pathlib import Path

import msgspec
import pytest

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.recipe import Layer, RecipeError, file_layer, override_layer, read_recipe


class FlipConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    strength: float = 0.3
    scales: dict[str, float] = {}


class BackboneTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    step_rows: int = 16
    condition_drop: float = 0.1
    flips: FlipConfig = FlipConfig()

    def __post_init__(self):
        if self.step_rows < 1:
            raise ConfigError(f"step_rows must be >= 1, found {self.step_rows}")


TABLES = {"sft": BackboneTable, "vae": FlipConfig}
BASE = Layer("base.toml", {"sft": {"optimiser": {"learning_rate": 1e-3, "steps": 10}}})


def _read(*texts: str, tmp_path: Path):
    layers = [BASE]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.toml").write_text(text)
        layers.append(file_layer(tmp_path / f"{index}.toml"))
    return read_recipe(layers, TABLES)


def test_later_layers_lie_on_top(tmp_path: Path):
    recipe = _read(
        "[sft]\nstep_rows = 4\n[sft.flips]\nscales = {image = 2.0}\n[trainer]\nprecision = 'bf16'", tmp_path=tmp_path
    )
    changed = read_recipe(
        [
            BASE,
            file_layer(tmp_path / "0.toml"),
            override_layer("sft.optimiser.learning_rate=5e-4"),
            override_layer("sft.flips.strength = 0"),
            override_layer("trainer.wandb_project=flights"),
        ],
        TABLES,
    )
    assert recipe.stage("sft").config == BackboneTable(step_rows=4, flips=FlipConfig(scales={"image": 2.0}))
    assert recipe.stage("sft").optimiser.learning_rate == 1e-3
    assert changed.stage("sft").optimiser.learning_rate == 5e-4
    assert changed.stage("sft").config.flips == FlipConfig(strength=0, scales={"image": 2.0})
    assert (changed.trainer.precision, changed.trainer.wandb_project) == ("bf16", "flights")
    assert list(changed.stages) == ["sft"]


def test_epochs_take_the_place_of_steps_and_back(tmp_path: Path):
    recipe = _read("[sft.optimiser]\nepochs = 3", tmp_path=tmp_path)
    assert (recipe.stage("sft").optimiser.epochs, recipe.stage("sft").optimiser.steps) == (3, None)
    back = read_recipe([BASE, file_layer(tmp_path / "0.toml"), override_layer("sft.optimiser.steps=7")], TABLES)
    assert (back.stage("sft").optimiser.epochs, back.stage("sft").optimiser.steps) == (None, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sft.optimiser]\nlearnin_rate = 1.0", "unknown key sft.optimiser.learnin_rate; did you mean learning_rate?"),
        ("[sft]\ncondition_dropp = 1.0", "unknown key sft.condition_dropp; did you mean condition_drop?"),
        ("[sft.flips]\nstrngth = 1.0", "unknown key sft.flips.strngth; did you mean strength?"),
        ("[sft]\nqqq = 1.0", "unknown key sft.qqq; known are condition_drop, flips, optimiser, step_rows"),
        ("[trainer]\nsave_evry = 1", "unknown key trainer.save_evry; did you mean save_every"),
        ("[stf]\nstep_rows = 1", r"unknown key \[stf\]; did you mean sft?"),
        ("sft = 3", "sft is a table, found 3"),
        ("[sft]\nstep_rows = 'four'", "sft.step_rows: Expected `int`, got `str`"),
        ("[sft]\nstep_rows = 0", "sft: step_rows must be >= 1, found 0"),
        ("[sft.optimiser]\nbetas = [0.9, 'x']", r"sft.optimiser.betas\[1\]: Expected `float`, got `str`"),
        ("[sft.optimiser]\nschedule = 'linear'", "sft.optimiser.schedule: Invalid enum value 'linear'"),
        ("[sft.flips.scales]\nimage = 'x'", r"sft.flips.scales\[...\]: Expected `float`, got `str`"),
        ("[sft", "not TOML"),
    ],
)
def test_mistakes_are_named_with_file_and_key(text: str, message: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=f"^{tmp_path}/0.toml: {message}".replace("?", r"\?")):
        _read(text, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft.step_rows", "--set sft.step_rows: give TABLE.KEY=VALUE, e.g. sft.optimiser.learning_rate=5e-4"),
        ("step_rows=3", "--set step_rows=3: give TABLE.KEY=VALUE"),
        ("sft..step_rows=3", "--set sft..step_rows=3: give TABLE.KEY=VALUE"),
        ("sft.step_row=3", "--set sft.step_row=3: unknown key sft.step_row; did you mean step_rows?"),
        ("sft.step_rows=many", "--set sft.step_rows=many: sft.step_rows: Expected `int`, got `str`"),
        ("sft.optimiser.learning_rate=-1", "--set sft.optimiser.learning_rate=-1: sft.optimiser: optimiser.learning"),
    ],
)
def test_mistakes_in_overrides_are_named_as_they_were_typed(text: str, message: str):
    with pytest.raises(RecipeError) as caught:
        read_recipe([BASE, override_layer(text)], TABLES)
    assert str(caught.value).startswith(message)


def test_a_stage_without_a_table_says_which_there_are():
    with pytest.raises(RecipeError, match=r"the recipe has no table \[vae\]; it has sft"):
        read_recipe([BASE], TABLES).stage("vae")


def test_a_missing_learning_rate_is_named():
    with pytest.raises(RecipeError, match=r"sft.optimiser: Object missing required field `learning_rate`"):
        read_recipe([Layer("mine.toml", {"sft": {}})], TABLES)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"none.toml: no recipe can be read"):
        file_layer(tmp_path / "none.toml")
