"""Flights of a batch are the flights that the plain PyTorch walk makes, one by one."""

import numpy as np
import pytest
import torch
from small_models import STATS, random_frames, random_model, save_random_checkpoint, tiny_config, tokenizer_json
from tokenizers import Tokenizer

from worldvln_edge.action_windows import context_frame
from worldvln_edge.config import ConfigError, GenerationConfig
from worldvln_edge.models.generation import TextCondition, generate
from worldvln_edge.models.quantizer import encode_bits
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.grpo.clip_generation import ClipGenerator
from worldvln_edge.training.grpo.policy_steps import is_policy_step, rollout_steps
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.stages.vae import frames_to_video

INSTRUCTIONS = ("fly forward", "turn left to the red tower .", "climb 5 m", "fly back", "turn right")
SEEDS = (7, 20260320, 8, 9, 10)
UNGUIDED = GenerationConfig(cfg=1.0, tau_image=1.0, tau_video=1.0)


def policy_of(config=None, **options) -> RolloutPolicy:
    config = config or tiny_config(repetitions=1)
    tokenizer = PromptTokenizer(Tokenizer.from_str(tokenizer_json(config)), config.world_model.text_max_tokens)
    return RolloutPolicy(random_model(config), STATS.latent_head, tokenizer, **{"rows": 4, **options})


@pytest.fixture(scope="module")
def policy(one_thread) -> RolloutPolicy:
    return policy_of()


def frames_of(policy: RolloutPolicy, seed: int) -> np.ndarray:
    return np.stack(random_frames(policy.config, policy.config.horizon.num_frames, seed))


def fly(policy: RolloutPolicy, rows) -> list[list]:
    """Planned segments of flights given as (instruction, seed, frames), whatever they plan."""
    batch = policy.begin([row[0] for row in rows], [row[1] for row in rows])
    points, planned = policy.config.horizon.points, []
    for first, last in zip((0, *points[:-2]), points[:-1], strict=True):
        batch.observe({index: row[2][first:last] for index, row in enumerate(rows)})
        planned.append(batch.plan())
    return [[segment[index] for segment in planned] for index in range(len(rows))]


def assert_equal(one, other) -> None:
    for left, right in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left.bits, right.bits, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(left.log_probs, right.log_probs, strict=True))
        assert np.array_equal(left.actions, right.actions)


@pytest.mark.parametrize("clips_see", ["one_scale_each", "every_earlier_scale"])
def test_a_flight_is_what_the_plain_walk_over_the_whole_horizon_gives(clips_see):
    """Nothing kept between segments there: the prefix is encoded, generated with observed bits, and decoded again."""
    config = tiny_config(repetitions=2, context_from_largest_no=0 if clips_see == "every_earlier_scale" else 1)
    policy = policy_of(config, policy_scales="all", repetitions="all", rows=2)
    model, horizon = policy.model, config.horizon
    rows = [(INSTRUCTIONS[i], SEEDS[i], frames_of(policy, i)) for i in range(2)]
    flown = fly(policy, rows)
    for (instruction, seed, frames), segments in zip(rows, flown, strict=True):
        prompt = torch.from_numpy(policy._tokenizer.encode(tagged_prompt(instruction, horizon)))
        features = model.text_encoder(prompt[None])[0]
        for g, planned in enumerate(segments):
            seen, then = horizon.points[g], horizon.points[g + 1]
            schedule = ScaleSchedule(config.schedule, 1 + (then - 1) // config.video_vae.temporal_stride)
            latents = model.vae.raw_features(
                model.vae.encode(frames_to_video(torch.from_numpy(frames[None, :seen])))[0]
            )
            forced = []
            for clip in schedule.clips[: g + 1]:
                forced += encode_bits(latents[:, :, clip.frame_slice], clip, config.world_model)[0]
            text = TextCondition.build(model.world_model, features, guided=False)
            whole = generate(model.world_model, schedule, text, UNGUIDED, seed, forced, record=True)
            drawn = [bits[0].to(torch.uint8) for bits in whole.bits[len(forced) :]]
            assert all(torch.equal(a, b) for a, b in zip(planned.bits, drawn, strict=True))
            for record, log_probs in zip(whole.records[len(forced) :], planned.log_probs, strict=True):
                expected = torch.log_softmax(record.logits_RLd2[0], -1).unflatten(0, record.step.thw)
                expected = torch.where(record.bits_BThwd[0], expected[..., 1], expected[..., 0])
                torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
            first = context_frame(seen, config.action_decoder.left_context)
            decoded = model.vae.decode_features(whole.summed_BcTHW)[0][:, :, first - 1 :]
            actions = model.latent_head.actions(
                model.latent_head.tokens(decoded), STATS.latent_head, observed_frames=seen, next_observed_frames=then
            )
            np.testing.assert_allclose(planned.actions, actions, atol=1e-3)


def test_a_flight_is_the_same_bit_for_bit_whichever_flights_share_its_batch(policy):
    rows = [(INSTRUCTIONS[i], SEEDS[i], frames_of(policy, i)) for i in range(5)]
    together = fly(policy, rows[:4])
    assert_equal(fly(policy, rows[1:2])[0], together[1])
    assert_equal(fly(policy, [rows[4], rows[3], rows[2], rows[1]])[3], together[1])
    assert any(not torch.equal(a, b) for a, b in zip(together[0][0].bits, together[1][0].bits, strict=True))


def test_a_flight_that_ended_does_not_touch_the_others(policy):
    rows = [(INSTRUCTIONS[i], SEEDS[i], frames_of(policy, i)) for i in range(3)]
    expected = fly(policy, rows)
    batch = policy.begin(INSTRUCTIONS[:3], SEEDS[:3])
    points = policy.config.horizon.points
    batch.observe({i: row[2][:1] for i, row in enumerate(rows)})
    first = batch.plan()
    batch.observe({i: rows[i][2][1 : points[1]] for i in (0, 2)})
    second = batch.plan()
    assert_equal([first[2], second[2]], expected[2][:2])


def test_the_number_of_rows_changes_a_flight_by_rounding_only(policy):
    row = (INSTRUCTIONS[0], SEEDS[0], frames_of(policy, 0))
    alone = fly(policy_of(rows=1), [row])[0]
    for one, other in zip(alone, fly(policy, [row])[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.bits, other.bits, strict=True))
        for a, b in zip(one.log_probs, other.log_probs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-3)


def test_with_semantic_scales_every_detail_bit_is_the_likelier_one_and_none_is_scored(policy):
    latents = torch.randn(
        4, policy.config.world_model.latent_channels, 1, 2, 3, generator=torch.Generator().manual_seed(0)
    )
    drawing, scoring = (generator_of(one, INSTRUCTIONS[:4]) for one in (policy, policy_of(policy_scales="all")))
    drawing.observe(0, latents)
    scoring.observe(0, latents)
    drawn = drawing.generate(1, SEEDS[:4])
    scored = scoring.generate(1, [0] * 4, forced_bits=drawn.bits)
    steps = rollout_steps(policy.schedule.clips[1], "last")
    assert {step.is_semantic for step in steps} == {True, False}
    for step, log_probs, of_all in zip(steps, drawn.log_probs, scored.log_probs, strict=True):
        if is_policy_step(step, "semantic"):
            assert torch.equal(log_probs, of_all)
            assert bool((of_all.exp() < 0.5).any())
        else:
            assert log_probs.shape == (4, 0)
            assert bool((of_all.exp() >= 0.5).all())


def generator_of(policy: RolloutPolicy, instructions) -> ClipGenerator:
    return ClipGenerator(
        policy.model.world_model,
        policy.schedule,
        [policy._text(text) for text in instructions],
        policy_scales=policy.policy_scales,
        repetitions=policy.repetitions,
    )


@pytest.mark.parametrize("repetitions", ["last", "all"])
@pytest.mark.parametrize("policy_scales", ["semantic", "all", 1])
def test_bits_that_are_given_score_as_when_they_were_drawn(policy_scales, repetitions):
    config = tiny_config(repetitions=2)
    policy = policy_of(config, policy_scales=policy_scales, repetitions=repetitions)
    torch.manual_seed(0)
    generator = generator_of(policy, INSTRUCTIONS[:4])
    generator.observe(0, torch.randn(4, config.world_model.latent_channels, 1, 2, 3))
    drawn = generator.generate(1, SEEDS[:4])
    given = generator.generate(1, [0] * 4, forced_bits=drawn.bits)
    expected = sum(config.schedule.video_repetition) if repetitions == "all" else config.schedule.scales_per_clip
    assert len(drawn.bits) == expected
    assert all(torch.equal(a, b) for a, b in zip(drawn.log_probs, given.log_probs, strict=True))
    assert torch.equal(drawn.codes_BcTHW, given.codes_BcTHW)
    assert all(bool((one <= 0).all()) for one in drawn.log_probs)


def test_a_number_of_scales_draws_the_coarsest(policy):
    latents = torch.randn(
        4, policy.config.world_model.latent_channels, 1, 2, 3, generator=torch.Generator().manual_seed(0)
    )
    generator = generator_of(policy_of(policy_scales=1), INSTRUCTIONS[:4])
    generator.observe(0, latents)
    drawn = generator.generate(1, SEEDS[:4])
    first, *others = drawn.log_probs
    assert bool((first < 0).all())
    assert all(log_probs.numel() == 0 for log_probs in others)
    assert sum(step.is_semantic for step in rollout_steps(policy.schedule.clips[1], "last")) > 1


@pytest.mark.parametrize("scales", [0, 99])
def test_scales_that_a_clip_does_not_have_are_refused(scales):
    with pytest.raises(ConfigError, match=rf"grpo.policy_scales must be 1..\d for tiny, found {scales}"):
        policy_of(policy_scales=scales)


def test_draws_follow_their_probabilities(policy):
    """Of the first scale over 400 seeds: the mean bit lies within four standard errors of the mean probability."""
    generator = generator_of(policy, INSTRUCTIONS[:1] * 4)
    torch.manual_seed(1)
    latents = torch.randn(1, policy.config.world_model.latent_channels, 1, 2, 3)
    generator.observe(0, latents.expand(4, -1, -1, -1, -1).contiguous())
    drawn = [generator.generate(1, list(range(first, first + 4))) for first in range(0, 400, 4)]
    bits = torch.cat([one.bits[0] for one in drawn]).float()
    log_probs = torch.cat([one.log_probs[0] for one in drawn])
    probability = torch.where(bits > 0, log_probs.exp(), 1 - log_probs.exp())[0]
    error = (probability * (1 - probability) / 400).sqrt()
    assert bool(((bits.mean(0) - probability).abs() < 4 * error + 1e-6).all())


def test_a_checkpoint_on_disk_flies_and_says_which_it_is(policy, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        save_random_checkpoint(tmp_path / name, policy.config, seed=seed)
    one, two = (RolloutPolicy.load(tmp_path / name, rows=1) for name in ("one", "two"))
    assert one.digest != two.digest
    (segments,) = fly(one, [(INSTRUCTIONS[0], SEEDS[0], frames_of(policy, 0))])
    assert len(segments) == policy.config.horizon.segments
    assert all(segment.is_finite for segment in segments)


def test_the_digest_is_of_everything_that_a_flight_depends_on(policy):
    same, other = policy_of(), policy_of()
    with torch.no_grad():
        other.model.latent_head.tsformer.head.bias[0] += 1
    tokenizer = other._tokenizer
    assert same.digest == policy.digest
    assert RolloutPolicy(other.model, STATS.latent_head, tokenizer).digest != policy.digest
    assert RolloutPolicy(same.model, STATS.rgb_head, tokenizer).digest != policy.digest
    assert RolloutPolicy(same.model, None, tokenizer).digest != policy.digest


def test_a_segment_of_two_clips_is_refused():
    with pytest.raises(ConfigError, match=r"a segment has 8 frames and a clip 4; rollouts need one clip a segment"):
        policy_of(tiny_config(clips_per_segment=2))


def test_wrong_numbers_of_flights_and_rows_are_refused(policy):
    with pytest.raises(ValueError, match="rows must be >= 1, found 0"):
        policy_of(rows=0)
    with pytest.raises(ValueError, match=r"1\.\.4 flights go together, each with a seed; found 5 instructions and 5"):
        policy.begin(INSTRUCTIONS, SEEDS)
    with pytest.raises(ValueError, match=r"found 1 instructions and 2 seeds"):
        policy.begin(INSTRUCTIONS[:1], SEEDS[:2])


def test_wrong_frames_and_a_segment_too_many_are_refused(policy):
    batch = policy.begin(INSTRUCTIONS[:1], SEEDS[:1])
    with pytest.raises(ValueError, match=r"no segment -1 of 3: observe the frames in front of it first"):
        batch.plan()
    frames = frames_of(policy, 0)
    with pytest.raises(
        ValueError, match=r"frames of flight 0 must be uint8 \[1, 16, 24, 3\] \(segment 0\), found uint8"
    ):
        batch.observe({0: frames[:2]})
    for first, last in ((0, 1), (1, 5), (5, 9), (9, 13)):
        batch.observe({0: frames[first:last]})
    with pytest.raises(ValueError, match=r"no segment 3 of 3"):
        batch.plan()
