"""The world model on rows side by side: texts are padded, and rows do not see each other."""

import pytest
import torch
from small_models import WORDS, random_model, tiny_config

from worldvln_edge.config import ScheduleConfig
from worldvln_edge.models.attention_mask import all_scales
from worldvln_edge.models.quantizer import SelfCorrection, encode_for_training
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.backbone import (
    TextBatch,
    visual_hidden,
)
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer

CONFIG = tiny_config()
SCHEDULE = ScaleSchedule(CONFIG.schedule, 7)
PROMPTS = ("fly forward 5 m .", "turn left", "climb to the red tower", "fly back")


@pytest.fixture(scope="module")
def model() -> WorldVLN:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def text() -> TextBatch:
    tokenizer = build_word_tokenizer(WORDS, "<<<t=3s>>>", CONFIG.text_encoder.vocabulary)
    return TextBatch(PROMPTS, PromptTokenizer(tokenizer, CONFIG.world_model.text_max_tokens), CONFIG)


def _latents(count: int = 4) -> torch.Tensor:
    shape = (count, CONFIG.world_model.latent_channels, 7, *CONFIG.schedule.latent_hw)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_padding_does_not_change_a_text(model: WorldVLN, text: TextBatch):
    features, lengths = text.features(model.text_encoder, torch.arange(4))
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS, "<<<t=3s>>>", 32), CONFIG.world_model.text_max_tokens)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.from_numpy(tokenizer.encode(tagged_prompt(prompt, CONFIG.horizon)))[None]
        assert lengths[row] == ids.shape[1]
        torch.testing.assert_close(features[row, : lengths[row]], model.text_encoder(ids)[0], atol=1e-5, rtol=1e-4)


def test_rows_of_a_batch_do_not_see_each_other(model: WorldVLN, text: TextBatch):
    """Also with different repetitions and text lengths in one batch."""
    latents = _latents()
    rows = torch.arange(4)
    corruption = SelfCorrection(SCHEDULE, 0.3, torch.Generator().manual_seed(2))
    scales = [
        scale
        for clip in SCHEDULE.clips
        for scale in encode_for_training(latents[:, :, clip.frame_slice], clip, CONFIG.world_model, corruption)
    ]
    assert len({tuple(scale.real_scale_id_B.tolist()) for scale in scales}) > 1
    features, lengths = text.features(model.text_encoder, rows)
    together = visual_hidden(model.world_model, SCHEDULE, scales, features, lengths)
    for row in range(4):
        alone = [
            type(scale)(
                clip=scale.clip,
                scale=scale.scale,
                real_scale_id_B=scale.real_scale_id_B[row : row + 1],
                input_BLC=scale.input_BLC[row : row + 1],
                label_bits_BLd=scale.label_bits_BLd[row : row + 1],
            )
            for scale in scales
        ]
        single = features[row : row + 1, : lengths[row]]
        hidden = visual_hidden(model.world_model, SCHEDULE, alone, single, lengths[row : row + 1])
        torch.testing.assert_close(hidden[0], together[row], atol=2e-4, rtol=1e-3)


def test_published_training_sees_every_earlier_scale():
    schedule = ScaleSchedule(
        ScheduleConfig(
            scale_hw=((1, 1), (2, 2)),
            image_repetition=(1, 1),
            video_repetition=(1, 1),
            semantic_scales=1,
            context_from_largest_no=0,
        ),
        5,
    )
    for key in all_scales(schedule):
        assert schedule.references_of_scale(*key) == tuple(k for k in all_scales(schedule) if k < key)
