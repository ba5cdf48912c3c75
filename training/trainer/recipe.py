"""Recipes: TOML files with a table per component, read strictly into the components' own configs.

    [trainer]                # TrainerConfig
    [sft]                    # config of the stage
    [sft.optimiser]          # OptimiserConfig
    [data]                   # any other table that the reader knows

A recipe is layered: the packaged one of the preset, then the user's file, then `--set` overrides. An unknown key is an
error that names the file, the key and what comes nearest.
Source: spec/training.md 7 (Q1).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.optimiser import OptimiserConfig
from worldvln_edge.training.trainer.trainer import TrainerConfig

_TRAINER, _OPTIMISER = "trainer", "optimiser"


class RecipeError(ValueError):
    """A recipe that does not say something sensible: where, what, and what is allowed."""


class StageRecipe(NamedTuple):
    config: Any
    """Of the stage: an instance of the struct that the stage declares."""
    optimiser: OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    trainer: TrainerConfig
    stages: Mapping[str, StageRecipe]
    tables: Mapping[str, Any]
    """Instances of the other structs, by table."""

    def stage(self, name: str) -> StageRecipe:
        """What the recipe says of a stage. Raises RecipeError where it says nothing."""
        if name not in self.stages:
            raise RecipeError(
                f"the recipe has no table [{name}]; it has {', '.join(self.stages) or 'none'}. Give --config with one"
            )
        return self.stages[name]


class Layer(NamedTuple):
    """One source of values."""

    source: str
    """In messages: a file, or the override as it was typed."""
    values: Mapping[str, Any]


def read_recipe(
    layers: Sequence[Layer],
    stages: Mapping[str, type[msgspec.Struct]],
    tables: Mapping[str, type[msgspec.Struct]] | None = None,
) -> Recipe:
    """Merge layers, later ones on top, and check every value.

    Args:
        layers: as `packaged_layer`, `file_layer`, `override_layer` give them.
        stages: name of the table -> config of the stage.
        tables: the same for tables that are no stage; one that no layer has holds its defaults.

    Raises:
        RecipeError: an unknown key, or a value of the wrong type or range.
    """
    others: dict[str, type[msgspec.Struct]] = {_TRAINER: TrainerConfig, **(tables or {})}
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_keys(layer, stages, others)
        merged = _merge(merged, layer.values)
    found = {}
    for name, struct in stages.items():
        if name in merged:
            table = dict(merged[name])
            optimiser = table.pop(_OPTIMISER, {})
            found[name] = StageRecipe(
                _convert(table, struct, name, layers),
                _convert(optimiser, OptimiserConfig, f"{name}.{_OPTIMISER}", layers),
            )
    known = {name: _convert(merged.get(name, {}), struct, name, layers) for name, struct in others.items()}
    return Recipe(trainer=known.pop(_TRAINER), stages=found, tables=known)


def packaged_layer(preset: str) -> Layer | None:
    """The packaged recipe of a preset, or None."""
    file = resources.files("worldvln_edge.training") / "recipes" / f"{preset}.toml"
    if not file.is_file():
        return None
    return Layer(f"the packaged recipe {preset}.toml", _decode(file.read_text(encoding="utf-8"), file.name))


def file_layer(path: Path) -> Layer:
    """A recipe file. Raises RecipeError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no recipe can be read ({error})") from error
    return Layer(str(path), _decode(text, str(path)))


def override_layer(text: str) -> Layer:
    """`sft.optimiser.learning_rate=5e-4`. The value is TOML; what is none is a string. Raises RecipeError."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise RecipeError(f"--set {text}: give TABLE.KEY=VALUE, e.g. sft.optimiser.learning_rate=5e-4")
    try:
        values: Any = msgspec.toml.decode(f"value = {value.strip()}")["value"]
    except msgspec.DecodeError:
        values = value.strip()
    for part in reversed(parts):
        values = {part: values}
    return Layer(f"--set {text}", values)


def _decode(text: str, source: str) -> dict[str, Any]:
    try:
        return msgspec.toml.decode(text)
    except msgspec.DecodeError as error:
        raise RecipeError(f"{source}: not TOML ({error})") from error


def _check_keys(
    layer: Layer, stages: Mapping[str, type[msgspec.Struct]], others: Mapping[str, type[msgspec.Struct]]
) -> None:
    tables = {**others, **stages}
    for name, table in layer.values.items():
        _check_known(layer.source, "", name, tables)
        if not isinstance(table, Mapping):
            raise RecipeError(f"{layer.source}: {name} is a table, found {table!r}")
        for path, key, known in _walk(table, tables[name], name, is_stage=name in stages):
            _check_known(layer.source, path, key, known)


def _walk(
    table: Mapping[str, Any], struct: type[msgspec.Struct], path: str, *, is_stage: bool
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every key of a table, with the keys that its place knows."""
    known = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    if is_stage:
        known[_OPTIMISER] = OptimiserConfig
    for key, value in table.items():
        yield path, key, known
        inner = known.get(key)
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from _walk(value, inner, f"{path}.{key}", is_stage=False)


def _check_known(source: str, path: str, key: str, known: Mapping[str, Any]) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    place = f"{path}.{key}" if path else f"[{key}]"
    nearest = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
    raise RecipeError(f"{source}: unknown key {place}; {nearest}")


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    # `steps` and `epochs` exclude each other: the one that a later layer gives takes the place of the other.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in above and other not in above and other in below:
            merged.pop(other)
    return merged


def _convert(table: Mapping[str, Any], struct: type, path: str, layers: Sequence[Layer]) -> Any:
    try:
        return msgspec.convert(table, struct)
    except (msgspec.ValidationError, ConfigError) as error:
        message, _, place = str(error).partition(" - at `$")
        full = f"{path}{place.rstrip('`')}"
        raise RecipeError(f"{_source_of(full, layers)}: {full}: {message}") from error


def _source_of(path: str, layers: Sequence[Layer]) -> str:
    """The layer on top that gives the value."""
    keys = re.sub(r"\[.*", "", path).split(".")
    for layer in reversed(layers):
        value: Any = layer.values
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return layer.source
    return "the recipe"
