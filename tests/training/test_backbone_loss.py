"""Loss of bits: the published values, and what scales count for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worldvln_edge.training.stages.backbone_network import drop_conditions
from worldvln_edge.training.stages.bit_loss import scale_weight, token_accuracies, token_losses


@pytest.fixture
def golden_training(golden) -> Path:
    return golden("training")


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
def test_losses_and_accuracies_of_tokens_are_the_published_ones(golden_training: Path):
    data = np.load(golden_training / "bit_loss.npz")
    start = 0
    for index, (t, h, w) in enumerate(data["sched"]):
        tokens = int(t * h * w)
        semantic = h * w < int(data["detail_min_tokens"])
        logits = torch.from_numpy(data["logits_semantic" if semantic else "logits_detail"][start : start + tokens])
        labels = torch.from_numpy(data[f"gt_{index}"]).reshape(tokens, -1).bool()
        losses = token_losses(logits.unflatten(-1, (-1, 2)), labels)
        np.testing.assert_allclose(losses, data["token_loss"][start : start + tokens], rtol=1e-9)
        accuracies = token_accuracies(logits.unflatten(-1, (-1, 2)), labels)
        np.testing.assert_allclose(accuracies, data["token_acc"][start : start + tokens], rtol=1e-9)
        np.testing.assert_allclose(-losses.sum() * labels.shape[1], data["logprob_per_scale"][index], rtol=1e-9)
        start += tokens


def test_the_loss_is_two_class_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 5, 7, 2, generator=generator)
    bits = torch.rand(2, 5, 7, generator=generator) < 0.5
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), bits.flatten().long())
    torch.testing.assert_close(token_losses(logits, bits).mean(), expected)


def test_equal_logits_say_zero():
    logits = torch.zeros(1, 4, 2)
    assert float(token_accuracies(logits, torch.tensor([[False, False, False, True]]))) == 0.75


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
