"""Batched prediction for training says what serving says."""

import msgspec
import numpy as np
import pytest
import torch
from small_models import random_model, tiny_config

from worldvln_edge.config import GenerationConfig, ModelConfig
from worldvln_edge.models.generation import TextCondition, generate
from worldvln_edge.models.quantizer import encode_bits
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.prediction import predict_clip

# Probabilities of 0 or 1: then bits do not depend on the random numbers, which the two sides draw differently.
CERTAIN = GenerationConfig(cfg=3.0, tau_image=1e-4, tau_video=1e-4, apg_norm_threshold=0.0)
CASES = {
    "one_scale_visible": tiny_config(generation=CERTAIN),
    "every_scale_visible_no_guidance": tiny_config(
        context_from_largest_no=0, generation=msgspec.structs.replace(CERTAIN, cfg=1.0)
    ),
}


@pytest.fixture(scope="module")
def model() -> WorldVLN:
    return random_model(tiny_config())


def _expected(model: WorldVLN, config: ModelConfig, latents: torch.Tensor, clip: int, text: torch.Tensor):
    """The serving loop with everything before `clip` observed."""
    schedule = ScaleSchedule(config.schedule, latents.shape[2])
    forced = [
        bits
        for earlier in schedule.clips[:clip]
        for bits in encode_bits(latents[:, :, earlier.frame_slice], earlier, config.world_model)[0]
    ]
    condition = TextCondition.build(model.world_model, text, guided=config.generation.cfg != 1)
    generated = generate(model.world_model, schedule, condition, config.generation, 0, forced, leak=3 * clip)
    return generated.summed_BcTHW[:, :, schedule.clips[clip].frame_slice]


@pytest.mark.parametrize(
    ("clip", "case"),
    [
        (1, "one_scale_visible"),
        (2, "one_scale_visible"),
        (3, "one_scale_visible"),
        (1, "every_scale_visible_no_guidance"),
        (2, "every_scale_visible_no_guidance"),
        (3, "every_scale_visible_no_guidance"),
    ],
)
def test_certain_bits_are_those_of_serving(model: WorldVLN, clip: int, case: str):
    config = CASES[case]
    generator = torch.Generator().manual_seed(clip)
    latents = torch.randn(3, 16, 7, 2, 3, generator=generator)
    lengths = [5, 7, 3]
    text = torch.randn(3, 7, config.world_model.text_channels, generator=generator)
    schedule = ScaleSchedule(config.schedule, 7)
    predicted = predict_clip(model.world_model, config, schedule, clip, latents, text, lengths, generator)
    for row, length in enumerate(lengths):
        expected = _expected(model, config, latents[row : row + 1], clip, text[row, :length])
        np.testing.assert_allclose(predicted[row], expected[0], atol=1e-5)


def test_draws_follow_the_generator(model: WorldVLN):
    config = tiny_config()
    schedule = ScaleSchedule(config.schedule, 7)
    latents, text = torch.randn(2, 16, 7, 2, 3), torch.randn(2, 4, config.world_model.text_channels)

    def predict(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return predict_clip(model.world_model, config, schedule, 1, latents, text, [4, 4], generator)

    assert torch.equal(predict(0), predict(0))
    assert not torch.equal(predict(0), predict(1))


def test_what_comes_later_is_not_looked_at(model: WorldVLN):
    config = tiny_config()
    schedule = ScaleSchedule(config.schedule, 7)
    latents, text = torch.randn(1, 16, 7, 2, 3), torch.randn(1, 4, config.world_model.text_channels)
    changed = latents.clone()
    changed[:, :, 3:] += 5  # frames of clip 2 and later

    def predict(observed: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return predict_clip(model.world_model, config, schedule, 2, observed, text, [4], generator)

    assert torch.equal(predict(latents), predict(changed))
