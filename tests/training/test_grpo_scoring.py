"""One scoring function: what it says of flown bits is what the flight recorded, whatever shares the pass."""

from dataclasses import replace

import pytest
import torch
from grpo_flights import ended_after, fly, tiny_tokenizer
from small_models import random_model, tiny_config

from worldvln_edge.training.grpo.policy_batch import PolicyBatchMaker, ScoringError
from worldvln_edge.training.grpo.scoring import (
    bit_log_probs,
    check_drift,
    flown_log_probs,
    score_samples,
    segment_log_probs,
)
from worldvln_edge.training.stages.backbone_network import FrozenTextFeatures

CONFIG = tiny_config()
TOKENIZER = tiny_tokenizer(CONFIG)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def text(model):
    return FrozenTextFeatures(model.text_encoder, kept=8)


@pytest.fixture(scope="module")
def traces(model):
    return fly(model, TOKENIZER)


def _samples(traces):
    return [(trace, segment) for trace in traces for segment in range(len(trace.segments))]


@pytest.mark.parametrize("context", [1, 0], ids=["frame pack", "all earlier scales"])
@pytest.mark.parametrize("repetitions", ["last", "all"])
@pytest.mark.parametrize("policy_scales", ["semantic", "all", 1])
def test_scores_of_flown_bits_are_those_of_the_flight(context: int, repetitions, policy_scales):
    config = tiny_config(context_from_largest_no=context)
    model = random_model(config)
    flown = fly(model, TOKENIZER, policy_scales=policy_scales, repetitions=repetitions)
    text = FrozenTextFeatures(model.text_encoder, kept=8)
    samples = _samples(flown)
    scores = score_samples(model.world_model, PolicyBatchMaker(config, TOKENIZER), text, samples, together=5)
    for sample, scored in zip(samples, scores, strict=True):
        torch.testing.assert_close(scored, flown_log_probs(*sample), rtol=0, atol=1e-4)
    assert check_drift(samples, scores, limit=1e-4) <= 1e-4
    assert float(torch.stack([score.mean() for score in scores]).mean()) < -0.01


def test_the_sum_of_scores_is_the_recorded_log_probability(model, text, traces):
    by_shape = segment_log_probs(model.world_model, CONFIG, TOKENIZER, text, traces, 1)
    for trace, steps in zip(traces, by_shape, strict=True):
        assert [one.shape for one in steps] == [one.shape for one in trace.segments[1].log_probs]
        assert sum(float(one.double().sum()) for one in steps) == pytest.approx(trace.segments[1].log_prob, abs=1e-3)


def test_a_score_does_not_depend_on_what_shares_the_pass(model, text, traces):
    """Samples of one pass differ in segment, text and length."""
    maker, samples = PolicyBatchMaker(CONFIG, TOKENIZER), _samples(traces)
    alone = score_samples(model.world_model, maker, text, samples, together=1)
    together = score_samples(model.world_model, maker, text, samples, together=len(samples))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "repetitions", "policy_scales", "sequences"),
    [
        (1, "last", 1, 1),
        (1, "last", "semantic", 2),  # the third segment sees the middle scale of the clip that the first one draws
        (1, "last", "all", 3),  # every segment sees the finest scale of the clip that the one before draws
        (1, "all", 1, 2),  # the earlier repetitions of all segments, and the last ones
        (0, "last", "semantic", 3),  # every later scale would see what was drawn
    ],
)
def test_segments_of_a_flight_share_a_sequence_where_they_do_not_see_each_other(
    context: int, repetitions, policy_scales, sequences: int
):
    config = tiny_config(context_from_largest_no=context)
    model = random_model(config)
    flown = fly(model, TOKENIZER, policy_scales=policy_scales, repetitions=repetitions)
    batch = PolicyBatchMaker(config, TOKENIZER).make(_samples(flown))
    assert len(batch.prompts) == sequences * len(flown)


def test_scores_follow_bits_text_and_what_was_seen(model, text, traces):
    maker = PolicyBatchMaker(CONFIG, TOKENIZER)
    trace = traces[0]
    first = trace.segments[0]
    other_bits = (1 - first.bits[0], *first.bits[1:])
    changed = {
        "bits": replace(trace, segments=(replace(first, bits=other_bits), *trace.segments[1:])),
        "text": replace(trace, prompt="<<<t=3s>>>climb"),
        "seen": replace(trace, latents=-trace.latents),
    }
    usual = score_samples(model.world_model, maker, text, [(trace, 0)], together=1)[0]
    for what, flight in changed.items():
        assert not torch.allclose(usual, score_samples(model.world_model, maker, text, [(flight, 0)], together=1)[0]), (
            what
        )
    # Of one bit, both values have probabilities that add up to 1.
    both = score_samples(model.world_model, maker, text, [(changed["bits"], 0)], together=1)[0]
    bits = first.bits[0].numel()
    torch.testing.assert_close(usual[:bits].exp() + both[:bits].exp(), torch.ones(bits), rtol=0, atol=1e-6)


def test_scores_have_a_gradient_with_and_without_recomputed_blocks(model, text, traces):
    maker = PolicyBatchMaker(CONFIG, TOKENIZER)
    batch = maker.make(_samples(traces)[:3])
    features = text(list(batch.prompts), torch.device("cpu"))
    gradients = []
    for recomputes in (False, True):
        model.world_model.zero_grad()
        model.world_model.requires_grad_(True)
        bit_log_probs(model.world_model, batch, features, checkpoint_activations=recomputes).sum().backward()
        gradients.append([p.grad for p in model.world_model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    model.world_model.zero_grad()


def test_a_policy_that_did_not_fly_is_refused_with_the_flight_and_the_difference(text, traces):
    other = random_model(CONFIG, seed=5)
    maker, samples = PolicyBatchMaker(CONFIG, TOKENIZER), _samples(traces)
    scores = score_samples(other.world_model, maker, text, samples, together=4)
    with pytest.raises(ScoringError, match=r"task 'task-\d', candidate \d .* flight and trainer do not run the same"):
        check_drift(samples, scores, limit=1e-3)


def test_a_score_that_is_no_number_is_refused_wherever_it_stands(traces):
    samples = _samples(traces)
    for bad in range(len(samples)):
        scores = [flown_log_probs(*sample).clone() for sample in samples]
        scores[bad][-1] = float("nan")
        with pytest.raises(ScoringError, match=f"segment {samples[bad][1]}: a bit's log-probability differs by nan"):
            check_drift(samples, scores, limit=1e-3)


def test_traces_of_another_model_are_refused(model, text, traces):
    maker = PolicyBatchMaker(CONFIG, TOKENIZER)
    shorter = replace(traces[0], latents=traces[0].latents[:, :1])
    with pytest.raises(ScoringError, match=r"segment 1: bits .* are not of tiny, .* the checkpoint that flew"):
        maker.make([(shorter, 1)])
    part = traces[0].segments[0]
    silent = replace(part, log_probs=tuple(torch.zeros(0) for _ in part.log_probs))
    with pytest.raises(ScoringError, match="nothing was drawn, so nothing can be scored"):
        maker.make([(replace(traces[0], segments=(silent,)), 0)])


def test_a_flight_that_ended_early_is_scored_as_far_as_it_came(model, text, traces):
    short = ended_after(traces[0], 1)
    maker = PolicyBatchMaker(CONFIG, TOKENIZER)
    scored = score_samples(model.world_model, maker, text, [(short, 0)], together=1)[0]
    torch.testing.assert_close(scored, flown_log_probs(traces[0], 0), rtol=0, atol=1e-4)
