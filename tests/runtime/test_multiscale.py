"""The quantiser on the host gives the bits of the one in PyTorch."""

import numpy as np
import pytest
import torch
from small_models import tiny_config

from worldvln_edge.models.quantizer import encode_bits, step_input, tokens_of_latents
from worldvln_edge.presets import preset
from worldvln_edge.runtime.worldvln.multiscale import encode_clip
from worldvln_edge.scale_schedule import ScaleSchedule

CONFIGS = {"tiny": tiny_config(), "nano": preset("nano"), "mini": preset("mini")}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("clip_index", [0, 1])
def test_bits_inputs_and_codes_equal_pytorch(name: str, clip_index: int):
    config = CONFIGS[name]
    clip = ScaleSchedule(config.schedule, 5).clips[clip_index]
    shape = (config.world_model.latent_channels, clip.frames, *config.schedule.latent_hw)
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    observed = encode_clip(latents, clip, config.world_model)
    bits, summed = encode_bits(torch.from_numpy(latents)[None], clip, config.world_model)
    for found, expected in zip(observed.bits, bits, strict=True):
        np.testing.assert_array_equal(found, expected[0])
    np.testing.assert_allclose(observed.codes, summed[0], atol=1e-5)
    zeros = torch.zeros_like(summed)
    np.testing.assert_array_equal(observed.inputs[0], tokens_of_latents(step_input(zeros, clip.steps[0]))[0])
    for step, tokens in zip(clip.steps, observed.inputs.values(), strict=True):
        assert tokens.shape == (step.tokens, config.world_model.latent_channels)


def test_a_zero_residual_gives_bit_zero():
    config = CONFIGS["tiny"]
    clip = ScaleSchedule(config.schedule, 1).clips[0]
    observed = encode_clip(np.zeros((16, 1, 2, 3), np.float32), clip, config.world_model)
    assert not observed.bits[0].any()


def test_another_number_of_frames_is_refused():
    config = CONFIGS["tiny"]
    clip = ScaleSchedule(config.schedule, 3).clips[1]
    with pytest.raises(ValueError, match="clip 1 has 2 latent frames, found 3"):
        encode_clip(np.zeros((16, 3, 2, 3), np.float32), clip, config.world_model)
