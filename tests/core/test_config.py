"""Configurations that cannot work are refused where they are made, with the field and the numbers."""

import json
from pathlib import Path

import msgspec
import pytest

from worldvln_edge.config import (
    ConfigError,
    HorizonConfig,
    ModelConfig,
    ScheduleConfig,
    VideoVAEConfig,
    parse_model_config,
    read_model_config,
)
from worldvln_edge.presets import PRESET_NAMES, nano, preset

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
        (lambda: replace(nano().world_model, kv_heads=4), "heads by kv_heads"),
        (lambda: replace(nano().world_model, width=204, kv_heads=2), "must divide by 8"),
        (lambda: VideoVAEConfig(block_out_channels=(8, 8)), "needs two entries more"),
        (lambda: _nano_with(image_hw=(64, 80)), "image_hw .* does not fit"),
        (lambda: _nano_with(text_encoder=replace(nano().text_encoder, width=64)), "text_encoder.width 64 differs"),
        (lambda: _nano_with(world_model=replace(nano().world_model, latent_channels=32)), "expects 32"),
        (
            lambda: _nano_with(horizon=HorizonConfig(num_frames=50)),
            "num_frames - 1 must be a positive multiple of step",
        ),
        (lambda: _nano_with(horizon=HorizonConfig(num_frames=1)), "num_frames - 1 must be a positive multiple of step"),
        (lambda: _nano_with(horizon=HorizonConfig(num_frames=49, step=8)), "must be a multiple of the 16 frames"),
        (lambda: _with_decoder(left_context=0), "left_context must be >= 1"),
        (lambda: _with_decoder(rgb_head=replace(nano().action_decoder.rgb_head, window=18)), "window of 18 frames"),
        (
            lambda: _with_decoder(adapter=replace(nano().action_decoder.adapter, resize_hw=(8, 16))),
            "differs from latent head grid",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


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


@pytest.mark.parametrize(
    ("part", "field"),
    [("world_model", "heads"), ("world_model", "block_chunks"), ("horizon", "fps"), ("generation", "tau_video")],
)
def test_zero_sizes_are_refused_with_their_name(part: str, field: str):
    content = json.loads(preset("nano").to_json())
    content[part][field] = 0
    with pytest.raises(ConfigError, match=field.split("_")[0]):
        parse_model_config(json.dumps(content).encode(), "config.json")


def test_config_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="not a model config"):
        parse_model_config(b'{"name": "\xff"}', "config.json")
