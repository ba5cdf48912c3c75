"""Backbone finetuning: the published loss, and a model that learns what it is shown."""

import json
from pathlib import Path

import numpy as np
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
    BackboneTrainingConfig,
    TextBatch,
    bit_loss,
    drop_conditions,
    scale_weight,
    train_backbone,
    visual_hidden,
)
from worldvln_edge.training.stages.loop import OptimiserConfig
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


@pytest.fixture
def golden_training(golden) -> Path:
    return golden("training")


def _latents(count: int = 4) -> torch.Tensor:
    shape = (count, CONFIG.world_model.latent_channels, 7, *CONFIG.schedule.latent_hw)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _tokens(schedule_Nx3: np.ndarray) -> list[int]:
    return [int(n) for n in np.prod(schedule_Nx3, 1)]


@pytest.mark.golden
def test_scale_weights_are_the_published_ones(golden_training: Path):
    cases = json.loads((golden_training / "config.json").read_text(encoding="utf-8"))["scale_reweight"]
    data = np.load(golden_training / "scale_reweight.npz")
    packed = [_tokens(data["sched_A"]), _tokens(data["sched_B"])]
    named = {"rw4": ("", packed), "rw0": ("", packed), "big": ("_big", [_tokens(data["sched_big"])])}
    for case, (suffix, samples) in named.items():
        key = f"{case}_rw0p5_max40" if case == "big" else case
        weights = [
            scale_weight(n, sample[-1], cases[case]["k"], cases[case]["max"]) for sample in samples for n in sample
        ]
        np.testing.assert_allclose(np.array(weights) / sum(weights), data[f"weights_{key}"], rtol=1e-9)
        borders = np.cumsum([n for sample in samples for n in sample])[:-1]
        means = np.array([part.mean() for part in np.split(data[f"token_loss{suffix}"], borders)])
        loss = data["loss_big"] if case == "big" else data[f"loss_{case}"]
        np.testing.assert_allclose((means * weights).sum() / sum(weights), loss, rtol=1e-9)


@pytest.mark.golden
def test_bit_loss_is_the_published_one(golden_training: Path):
    data = np.load(golden_training / "bit_loss.npz")
    start = 0
    for index, (t, h, w) in enumerate(data["sched"]):
        tokens = int(t * h * w)
        semantic = h * w < int(data["detail_min_tokens"])
        logits = torch.from_numpy(data["logits_semantic" if semantic else "logits_detail"][start : start + tokens])
        labels = torch.from_numpy(data[f"gt_{index}"])
        loss = bit_loss(logits.unflatten(-1, (-1, 2)).double(), labels.bool())
        # `bit_loss` compares in the logits' own precision but its labels are float32.
        np.testing.assert_allclose(loss, data["token_loss"][start : start + tokens].mean(), rtol=1e-6)
        logprob = -loss * labels.numel()
        np.testing.assert_allclose(logprob, data["logprob_per_scale"][index], rtol=1e-6)
        start += tokens


def test_bit_loss_is_two_class_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 5, 7, 2, generator=generator)
    bits = torch.rand(2, 5, 7, generator=generator) < 0.5
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), bits.flatten().long())
    torch.testing.assert_close(bit_loss(logits, bits), expected)


def test_small_k_lifts_the_coarse_scales_up_to_the_limit():
    assert scale_weight(1, 6400, 0.0, 40) == 1
    assert scale_weight(1, 6400, 0.5, 40) == 40
    assert scale_weight(64, 64, 0.5, 40) == 64
    assert scale_weight(16, 64, 1.0, 40) == pytest.approx(16 * 2)


def test_dropped_conditions_are_the_unconditional_rows():
    features, uncond = torch.randn(3, 5, 4), torch.randn(9, 4)
    before = features.clone()
    dropped = drop_conditions(features, uncond, torch.tensor([False, True, False]))
    assert torch.equal(dropped[1], uncond[:5])
    assert torch.equal(dropped[[0, 2]], features[[0, 2]])
    assert torch.equal(features, before)


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


def test_four_sequences_are_learnt_by_heart(text: TextBatch, tmp_path: Path):
    model = WorldVLN(CONFIG)
    latents = _latents()
    training = BackboneTrainingConfig(
        optimiser=OptimiserConfig(learning_rate=6e-3, steps=80, warmup_steps=5, weight_decay=0.0, clip_norm=5.0),
        batch=4,
        flip_strength=0.0,
        condition_drop=0.0,
    )
    curve = tmp_path / "curve.jsonl"
    train_backbone(model.text_encoder, model.world_model, CONFIG, latents, text, training, curve, seed=0)
    rows = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["loss"] > 0.5
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["bit_ce_scale0"] < 0.2 * np.log(2)
    assert rows[-1]["bit_ce_scale1"] < 0.2 * np.log(2)
    assert rows[-1]["bit_ce_scale2"] < rows[0]["bit_ce_scale2"]
    assert not model.world_model.training
    assert not model.text_encoder.training


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
