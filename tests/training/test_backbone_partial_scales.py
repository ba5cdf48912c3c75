"""Parts of a schedule by name: what they hold, and that what a flight does not have is never drawn."""

from collections import Counter

import pytest
import torch
from small_models import tiny_config

from worldvln_edge.config import ConfigError
from worldvln_edge.models.attention_mask import visual_tokens
from worldvln_edge.presets import preset
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.partial_scales import DEFAULT_WEIGHTS, check_weights, draw_scales, partial_scales

RELEASED = ScaleSchedule(preset("worldvln-8b").schedule, 13)
TOKENS = {  # spec/training.md 2.5, at 1:1
    "image": 3904,
    "c1-sem8": 4720,
    "c1-sem": 6720,
    "c1-d0": 9024,
    "c1-d1": 10816,
    "c1-d2": 13120,
    "c2-sem": 10816,
    "c2-d2": 14400,
    "c3-sem": 17216,
    "c3-d2": 20800,
}


@pytest.mark.parametrize("name", TOKENS)
def test_options_hold_the_published_number_of_tokens(name: str):
    assert visual_tokens(RELEASED, partial_scales(name, RELEASED)) == TOKENS[name]


def test_options_hold_what_their_names_say():
    schedule = ScaleSchedule(tiny_config().schedule, 7)  # 3 scales a clip, 2 of them semantic, 4 clips
    image = ((0, 0), (0, 1), (0, 2))
    assert partial_scales("image", schedule) == image
    assert partial_scales("c1-sem", schedule) == (*image, (1, 0), (1, 1))
    assert partial_scales("c1-sem1", schedule) == (*image, (1, 0))
    assert partial_scales("c1-d0", schedule) == (*image, (1, 0), (1, 1), (1, 2))
    assert partial_scales("c2-sem", schedule) == ((0, 2), (1, 2), (2, 0), (2, 1))
    assert partial_scales("c3-d0", schedule) == ((0, 2), (1, 2), (2, 2), (3, 2))
    assert partial_scales("all-sem", schedule) == (*image, (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1))


def test_what_a_flight_does_not_have_is_no_option():
    schedule = ScaleSchedule(tiny_config().schedule, 3)  # clips 0 and 1
    assert partial_scales("c2-sem", schedule) is None
    assert partial_scales("c1-d1", schedule) is None
    assert partial_scales("c1-sem2", schedule) is None  # c1-sem says the same
    present = {partial_scales(name, schedule) for name in DEFAULT_WEIGHTS} - {None}
    generator = torch.Generator().manual_seed(0)
    assert {draw_scales(schedule, DEFAULT_WEIGHTS, generator) for _ in range(200)} == present


def test_every_scale_of_a_flight_is_trained_by_the_default_options():
    options = [partial_scales(name, RELEASED) for name in DEFAULT_WEIGHTS]
    assert {key for option in options for key in option} == {(c, s) for c in range(4) for s in range(14)}


def test_options_are_drawn_by_their_weights():
    generator = torch.Generator().manual_seed(0)
    weights = {"image": 3.0, "c1-sem": 1.0, "c2-sem": 0.0}
    counts = Counter(draw_scales(RELEASED, weights, generator) for _ in range(2000))
    assert counts[partial_scales("image", RELEASED)] == pytest.approx(1500, abs=100)
    assert partial_scales("c2-sem", RELEASED) not in counts


def test_names_and_weights_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="'c0-sem' names no part of a schedule; choose image"):
        check_weights({"c0-sem": 1.0})
    with pytest.raises(ConfigError, match="weight of 'image' must be finite and >= 0, found -1"):
        check_weights({"image": -1})
    with pytest.raises(ConfigError, match="no option has a weight above 0"):
        check_weights({"image": 0})
    with pytest.raises(ConfigError, match="a flight of 1 clips has none of c1-sem; add an option such as image"):
        draw_scales(ScaleSchedule(tiny_config().schedule, 1), {"c1-sem": 1.0}, torch.Generator())
    with pytest.raises(ConfigError, match="'c1' names no part"):
        partial_scales("c1", RELEASED)
