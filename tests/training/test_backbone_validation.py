"""Held-out metrics of the backbone: what they are measured by, and that they see whether the text is listened to."""

import math

import msgspec
import pytest
import torch
from backbone_stages import CONFIG, EXACT, FRAMES, INSTRUCTIONS, MixedFlights, make_stage, mean_loss
from small_models import random_model, tiny_config

from worldvln_edge.training.stages.backbone_rows import LatentSet
from worldvln_edge.training.stages.backbone_stage import BackboneConfig
from worldvln_edge.training.stages.backbone_validation import majority_baseline


def test_the_baseline_is_the_best_fixed_answer():
    bits = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 0.9, 0.1])
    baseline = majority_baseline(bits.sum(0), len(bits))
    best_ce = min_accuracy = 0.0
    for bit in range(3):
        column = bits[:, bit].float()
        candidates = torch.linspace(0.001, 0.999, 999)
        ce = [torch.nn.functional.binary_cross_entropy(p.expand(1000), column) for p in candidates]
        best_ce += float(min(ce)) / 3
        min_accuracy += max(float(column.mean()), 1 - float(column.mean())) / 3
    assert baseline.ce == pytest.approx(best_ce, abs=1e-4)
    assert baseline.accuracy == pytest.approx(min_accuracy, abs=1e-6)
    assert majority_baseline(torch.tensor([0, 4]), 4).ce == 0.0


def test_metrics_are_those_of_uncorrupted_rows():
    """However training corrupts, and however rows are put together."""
    model = random_model(CONFIG)
    flights = MixedFlights()
    rough = BackboneConfig(flip_strength=0.3, condition_drop=0.9, micro_rows=2)
    packed = BackboneConfig(packed_tokens=40)
    metrics = [make_stage(config, model=model, held_out=flights).validate() for config in (rough, rough, packed, EXACT)]
    assert metrics[0] == metrics[1]
    for other in metrics[2:]:
        assert other == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)
    assert math.isfinite(metrics[0]["text_effect_error"])


def test_a_validation_ends_after_the_rows_that_it_is_given():
    """A row of the released size runs whole, and twice: a large held-out set would stand between the steps."""
    model = random_model(CONFIG)
    cut = msgspec.structs.replace(EXACT, held_out_rows=2)
    first = MixedFlights(frames=FRAMES[:2], instructions=INSTRUCTIONS[:2])
    expected = make_stage(EXACT, model=model, held_out=first).validate()
    assert make_stage(cut, model=model, held_out=MixedFlights()).validate() == pytest.approx(expected)
    none = msgspec.structs.replace(EXACT, held_out_rows=0)
    assert make_stage(none, model=model, held_out=MixedFlights()).validate() == {}


def test_metrics_agree_with_training_where_training_corrupts_nothing():
    config = tiny_config(repetitions=1)
    model = random_model(config)
    flights = MixedFlights()
    stage = make_stage(EXACT, model=model, held_out=flights, model_config=config)
    metrics = stage.validate()
    rows = list(range(len(flights)))
    assert metrics["loss"] == pytest.approx(mean_loss(stage, rows), rel=1e-5)
    batch = stage.load(0, rows)
    weights = stage.weights(batch)
    means = {name: float(total.detach()) / weights[name] for name, total in stage.totals(batch).items()}
    del means["padding"]
    for name, value in means.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert metrics.keys() >= {"semantic_bit_ce", "detail_bit_accuracy", "majority_bit_ce_clip3_scale2"}


def test_a_model_that_listens_has_a_negative_text_effect_and_beats_the_baseline():
    """Eight flights that look alike at first, and go where their instructions say."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 3, 2, 3, generator=generator)
    latents[:, :, 0] = latents[:1, :, 0]
    flights = LatentSet(latents, [*INSTRUCTIONS, "fly left", "fly right"])
    stage = make_stage(EXACT, flights, held_out=flights)
    before = stage.validate()
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=6e-3)
    for epoch in range(40):
        batch = stage.load(epoch, range(8))
        optimiser.zero_grad()
        (stage.totals(batch)["loss"] / stage.weights(batch)["loss"]).backward()
        optimiser.step()
    after = stage.validate()
    assert after["text_effect"] + 2 * after["text_effect_error"] < 0
    assert after["text_effect"] < before["text_effect"]
    assert after["semantic_bit_ce"] < after["semantic_majority_bit_ce"]
    assert after["semantic_bit_ce"] < before["semantic_bit_ce"]


def test_flights_that_all_say_the_same_have_no_text_effect():
    flights = MixedFlights(frames=(3, 5), instructions=["climb", "climb"])
    metrics = make_stage(held_out=flights).validate()
    assert "text_effect" not in metrics
    assert "bit_ce" in metrics


def test_without_held_out_flights_there_are_no_metrics():
    assert make_stage().validate() == {}
    assert make_stage(held_out=MixedFlights(frames=(), instructions=())).validate() == {}
