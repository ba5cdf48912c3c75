"""Configurations that cannot work are refused where they are made, with the field and the numbers."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.config import (
    AdapterConfig,
    ConfigError,
    GenerationConfig,
    HorizonConfig,
    ModelConfig,
    ScheduleConfig,
    TimesFormerConfig,
    VideoVAEConfig,
    parse_model_config,
    read_model_config,
)
from worldvln_edge.presets import PRESET_NAMES, nano, preset
from worldvln_edge.scale_schedule import ScaleSchedule

replace = msgspec.structs.replace


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_preset_survives_json(name: str):
    config = preset(name)
    assert config.name == name
    assert parse_model_config(config.to_json(), "here") == config
    assert config.horizon.points == (1, 17, 33, 49)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown preset 'huge'; choose one of worldvln-8b, mini, nano"):
        preset("huge")


def test_released_preset_has_the_released_sizes():
    config = preset("worldvln-8b")
    assert (config.image_hw, config.schedule.scales_per_clip, config.schedule.latent_hw) == ((640, 640), 14, (40, 40))
    assert sum(h * w for h, w in config.schedule.scale_hw) == 3904
    assert (config.world_model.head_dim, config.video_vae.spatial_stride, config.video_vae.temporal_stride) == (
        128,
        16,
        4,
    )
    assert config.action_decoder.latent_head.tokens_per_frame == 480
    assert config.action_decoder.latent_head.outputs == 18


def _nano_with(**changes) -> ModelConfig:
    return replace(nano(), **changes)


def _schedule(**changes) -> ScheduleConfig:
    return replace(nano().schedule, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _schedule(scale_hw=()), "scale_hw is empty"),
        (lambda: _schedule(image_repetition=(1,)), "image_repetition must hold 4 numbers"),
        (lambda: _schedule(video_repetition=(1, 1, 0, 1)), "video_repetition must hold 4 numbers >= 1"),
        (lambda: _schedule(semantic_scales=5), "semantic_scales must be 0..4, found 5"),
        (lambda: _schedule(frames_inner_clip=0), "frames_inner_clip must be >= 1"),
        (lambda: _schedule(scale_hw=((1, 1), (2, 5), (3, 3), (4, 4))), "scale 2x5 is larger than the latent grid 4x4"),
        (lambda: _schedule(context_from_largest_no=5), r"context_from_largest_no must be 0\.\.4 .* found 5"),
        (lambda: _schedule(context_interval=-1), "context_interval must be >= 0, found -1"),
        (lambda: replace(nano().world_model, detail_bits=65), r"detail_bits must be 1\.\.64 .* found 65"),
        (lambda: replace(nano().world_model, norm_eps=0.0), "norm_eps must be finite and > 0"),
        (lambda: replace(nano().text_encoder, relative_buckets=5), "relative_buckets must be an even number >= 4"),
        (lambda: replace(nano().text_encoder, relative_max_distance=8), "relative_max_distance must be > .* found 8"),
        (lambda: _vae(block_out_channels=(32, 64, 64, 32)), "last two block_out_channels must be equal"),
        (
            lambda: _vae(block_out_channels=(32, 48, 64, 64)),
            "from 32 to 48 channels, spatial factor 2, does not divide",
        ),
        (lambda: _vae(temporal_factors=(2, 4)), r"temporal_factors must be 1 or 2 each, found \(2, 4\)"),
        (lambda: _head(window=1), "timesformer.window must be >= 2, found 1"),
        (lambda: _head(heads=5), "timesformer.width must divide by heads 5, found 96"),
        (lambda: _head(patch=24), r"timesformer.image_hw must divide by patch 24, found \(64, 64\)"),
        (lambda: AdapterConfig(resize_hw=(16, 18), hidden=32, groups=8, patch=4), "resize_hw must divide by patch 4"),
        (lambda: AdapterConfig(resize_hw=(16, 16), hidden=33, groups=8, patch=4), "hidden must divide by groups 8"),
        (lambda: _with_decoder(rgb_std=(0.3, 0.0, 0.3)), "rgb_std must be finite and > 0"),
        (lambda: _with_decoder(rgb_mean=(0.3, float("nan"), 0.3)), "rgb_mean must be finite"),
        (lambda: GenerationConfig(cfg=float("inf")), "cfg must be finite and >= 0, found inf"),
        (lambda: GenerationConfig(cfg=-1.0), "cfg must be finite and >= 0, found -1.0"),
        (lambda: GenerationConfig(cfg=2.0, tau_video=float("nan")), "tau_video must be finite and > 0"),
        (lambda: _nano_with(name=" "), "name is blank"),
        (lambda: replace(nano().world_model, kv_heads=4), "heads by kv_heads"),
        (lambda: replace(nano().world_model, width=204, kv_heads=2), "must divide by 8"),
        (lambda: VideoVAEConfig(block_out_channels=(8, 8)), "needs two entries more"),
        (lambda: _nano_with(image_hw=(64, 80)), "image_hw .* does not fit"),
        (lambda: _nano_with(text_encoder=replace(nano().text_encoder, width=64)), "text_encoder.width 64 differs"),
        (lambda: _nano_with(world_model=replace(nano().world_model, latent_channels=80)), "expects 80"),
        (
            lambda: _nano_with(horizon=HorizonConfig(num_frames=50)),
            "num_frames - 1 must be a positive multiple of step",
        ),
        (lambda: _nano_with(horizon=HorizonConfig(num_frames=1)), "num_frames - 1 must be a positive multiple of step"),
        (lambda: _nano_with(horizon=HorizonConfig(num_frames=49, step=8)), "must be a multiple of the 16 frames"),
        (lambda: _with_decoder(left_context=0), "left_context must be >= 1"),
        (lambda: _with_decoder(rgb_head=_head(window=18)), "rgb_head: a window of 18 frames does not fit into the 17"),
        (
            lambda: _with_decoder(adapter=replace(nano().action_decoder.adapter, resize_hw=(8, 16))),
            "differs from latent head grid",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def _vae(**changes) -> VideoVAEConfig:
    return replace(nano().video_vae, **changes)


def _head(**changes) -> TimesFormerConfig:
    return replace(nano().action_decoder.rgb_head, **changes)


def _with_decoder(**changes) -> ModelConfig:
    return _nano_with(action_decoder=replace(nano().action_decoder, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(color="red"), "unknown field `color`"),
        (lambda c: c.pop("schedule"), "missing required field `schedule`"),
        (lambda c: c["horizon"].update(step="16"), "Expected `int`, got `str`"),
        (lambda c: c.update(image_hw=[64, 80]), "does not fit"),
    ],
)
def test_file_says_where_and_what(tmp_path: Path, change, message: str):
    content = json.loads(nano().to_json())
    change(content)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_model_config(path)
    assert str(path) in str(caught.value)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ConfigError, match="here: not a model config"):
        parse_model_config(b"{", "here")


def test_configs_cannot_be_changed():
    with pytest.raises(AttributeError):
        nano().horizon.step = 4


JsonPath = tuple[str | int, ...]


def _integers(value: object, path: JsonPath = ()) -> list[JsonPath]:
    """Paths of all integers in JSON content, those in lists included."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, part in items for found in _integers(part, (*path, key))]
    return [path] if isinstance(value, int) and not isinstance(value, bool) else []


def _with_number(name: str, path: JsonPath, number: float) -> ModelConfig:
    content = json.loads(preset(name).to_json())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = number
    return parse_model_config(json.dumps(content).encode(), "config.json")


INTEGERS = _integers(json.loads(nano().to_json()))
MAY_BE_ZERO = {"semantic_scales", "context_frames", "context_from_largest_no", "context_interval"}
"""Fields whose docstring says what 0 means."""


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_integer_below_one_is_refused_with_its_name_unless_zero_means_something(name: str, number: int):
    for path in _integers(json.loads(preset(name).to_json())):
        field = next(str(key) for key in reversed(path) if isinstance(key, str))
        if number == 0 and field in MAY_BE_ZERO:
            assert getattr(_with_number(name, path, 0).schedule, field) == 0
            continue
        with pytest.raises(ConfigError, match=rf"\b{field}\b.*{number}"):
            _with_number(name, path, number)


@given(st.sampled_from(INTEGERS), st.integers(-2, 80))
def test_any_integer_is_refused_or_gives_a_schedule_that_refers_to_what_exists(path: JsonPath, number: int):
    try:
        config = _with_number("nano", path, number)
    except ConfigError:
        return
    latent_frames = 1 + (config.horizon.num_frames - 1) // config.video_vae.temporal_stride
    schedule = ScaleSchedule(config.schedule, latent_frames)
    assert schedule.clips[-1].frame_slice.stop == latent_frames
    for clip in schedule.clips:
        for earlier, scale in schedule.references(clip.index):
            assert 0 <= earlier < clip.index
            assert 0 <= scale < config.schedule.scales_per_clip


@pytest.mark.parametrize(("field", "number"), [("tau_video", 0), ("tau_image", -1), ("cfg", -1), ("apg_eta", -1)])
def test_numbers_of_the_sampling_are_refused_with_their_name(field: str, number: int):
    with pytest.raises(ConfigError, match=rf"generation\.{field} must be finite and .* found {number}"):
        _with_number("nano", ("generation", field), number)


def test_config_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="not a model config"):
        parse_model_config(b'{"name": "\xff"}', "config.json")
