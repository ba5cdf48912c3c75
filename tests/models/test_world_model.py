"""Promises of the world model that hold at any size: training equals generation, causality, repeatable draws."""

import msgspec
import pytest
import torch

from worldvln_edge.config import ConfigError, GenerationConfig, ScheduleConfig, WorldModelConfig
from worldvln_edge.models.attention_mask import RowLayout, all_scales, document_matrix, lay_out
from worldvln_edge.models.generation import TextCondition, generate, generate_clip
from worldvln_edge.models.guidance import adaptive_projected_guidance, classifier_free_guidance
from worldvln_edge.models.key_values import MissingReferenceError
from worldvln_edge.models.quantizer import (
    SelfCorrection,
    codes_of_bits,
    encode_bits,
    encode_for_training,
    resize_channels_area,
    resize_channels_trilinear,
)
from worldvln_edge.models.world_model import RMSNorm, WorldModel
from worldvln_edge.scale_schedule import ScaleSchedule

FRAMES = 4  # latent frames: the image, one full clip of two, one clip of one
UNGUIDED = GenerationConfig(cfg=1.0, tau_image=1.0, tau_video=1.0)
GUIDED = GenerationConfig(cfg=5.0, tau_image=1.0, tau_video=0.5)


def _schedule(repetitions: int = 1, context_from_largest_no: int = 1) -> ScaleSchedule:
    config = ScheduleConfig(
        scale_hw=((1, 1), (2, 2), (3, 4)),
        image_repetition=(repetitions,) * 3,
        video_repetition=(repetitions,) * 2 + (1,),
        semantic_scales=2,
        frames_inner_clip=2,
        context_from_largest_no=context_from_largest_no,
        context_interval=1,
    )
    return ScaleSchedule(config, FRAMES)


CONFIG = WorldModelConfig(
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    intermediate=64,
    block_chunks=1,
    text_channels=12,
    latent_channels=8,
    semantic_bits=4,
    detail_bits=8,
    text_max_tokens=16,
)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "head" in name or "embed" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(2, CONFIG.latent_channels, FRAMES, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randn(2, 5, CONFIG.text_channels, generator=torch.Generator().manual_seed(2))


def _encode(schedule: ScaleSchedule, features: torch.Tensor, strength: float = 0.0):
    corruption = SelfCorrection(schedule, strength, torch.Generator().manual_seed(3), last_repetition=True)
    return [
        scale
        for clip in schedule.clips
        for scale in encode_for_training(features[:, :, clip.frame_slice], clip, CONFIG, corruption)
    ]


def _training_logits(model, schedule, scales, text_BLt, text_tokens_B, keys=None):
    """Logits per scale of a training forward on the given encoded scales."""
    latents = torch.cat([scale.input_BLC for scale in scales], 1)
    ids = [int(scale.real_scale_id_B[0]) for scale in scales]
    layout = lay_out([[RowLayout(schedule, tokens, keys, ids)] for tokens in text_tokens_B], CONFIG)
    hidden = model(latents, text_BLt, layout.rope_B2Ln, layout.mask.dense())
    parts = hidden.split([scale.input_BLC.shape[1] for scale in scales], 1)
    semantic = schedule.config.semantic_scales
    return [model.logits(part, scale.scale < semantic) for part, scale in zip(parts, scales, strict=True)]


@pytest.mark.parametrize("context_from_largest_no", [1, 0])
@pytest.mark.parametrize("repetitions", [1, 2])
def test_training_forward_equals_cached_generation_scale_by_scale(
    model, features, text, repetitions, context_from_largest_no
):
    schedule = _schedule(repetitions, context_from_largest_no)
    with torch.no_grad():
        trained = _training_logits(model, schedule, _encode(schedule, features), text, [5, 3])
    for row, tokens in enumerate([5, 3]):
        bits = []
        for clip in schedule.clips:
            bits += encode_bits(features[row : row + 1, :, clip.frame_slice], clip, CONFIG)[0]
        condition = TextCondition.build(model, text[row, :tokens], guided=False)
        result = generate(model, schedule, condition, UNGUIDED, seed=0, forced_bits=bits, record=True)
        cached = [record.logits_RLd2 for record in result.records if record.step.is_last_repetition]
        assert len(cached) == len(trained)
        for ours, theirs in zip(trained, cached, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-4, rtol=0)


def test_scales_left_out_of_a_row_do_not_change_those_that_do_not_see_them(model, features, text):
    schedule = _schedule()
    scales = _encode(schedule, features)
    # Clip 1 refers to the last scale of clip 0 only, so its other scales may go.
    keys = [(0, 2), (1, 0), (1, 1)]
    subset = [scale for scale in scales if (scale.clip, scale.scale) in keys]
    with torch.no_grad():
        full = _training_logits(model, schedule, scales, text, [5, 5])
        part = _training_logits(model, schedule, subset, text, [5, 5], keys)
    for key, logits in zip(keys, part, strict=True):
        torch.testing.assert_close(logits, full[all_scales(schedule).index(key)], atol=1e-5, rtol=0)


def test_later_bits_never_change_earlier_logits(model, text):
    schedule = _schedule(2)
    condition = TextCondition.build(model, text[0])
    first = generate(model, schedule, condition, GUIDED, seed=7, record=True)
    for changed in range(len(first.bits)):
        bits = [b.clone() for b in first.bits]
        bits[changed] = ~bits[changed]
        second = generate(model, schedule, condition, GUIDED, seed=7, forced_bits=bits, record=True)
        for a, b in zip(first.records[: changed + 1], second.records[: changed + 1], strict=True):
            assert torch.equal(a.logits_RLd2, b.logits_RLd2)


def test_observed_bits_change_what_is_generated_after_them(model, text):
    schedule = _schedule()
    condition = TextCondition.build(model, text[0])
    first = generate(model, schedule, condition, GUIDED, seed=7, record=True)
    bits = [~b for b in first.bits]
    second = generate(model, schedule, condition, GUIDED, seed=7, forced_bits=bits, leak=3, record=True)
    assert not torch.equal(first.records[3].logits_RLd2, second.records[3].logits_RLd2)
    assert all(torch.equal(a, ~b) for a, b in zip(second.bits[:3], first.bits[:3], strict=True))


def test_text_changes_the_logits(model, text):
    schedule = _schedule()
    records = [
        generate(model, schedule, TextCondition.build(model, text[row], guided=False), UNGUIDED, 0, record=True).records
        for row in (0, 1)
    ]
    assert not torch.allclose(records[0][0].logits_RLd2, records[1][0].logits_RLd2, atol=1e-3)


def test_draws_depend_on_the_seed_alone(model, text):
    schedule, condition = _schedule(), TextCondition.build(model, text[0])
    first, again, other = (generate(model, schedule, condition, GUIDED, seed) for seed in (11, 11, 12))
    assert torch.equal(first.summed_BcTHW, again.summed_BcTHW)
    assert not torch.equal(first.summed_BcTHW, other.summed_BcTHW)


def test_leaving_out_unread_work_gives_the_same_bits(model, features, text):
    schedule, condition = _schedule(2), TextCondition.build(model, text[0])
    clip = schedule.clips[0]
    observed = encode_bits(features[:1, :, clip.frame_slice], clip, CONFIG)[0]
    fast = generate(model, schedule, condition, GUIDED, 5, forced_bits=observed, leak=3)
    full = generate(model, schedule, condition, GUIDED, 5, forced_bits=observed, leak=3, record=True)
    assert fast.records == []
    assert torch.equal(fast.summed_BcTHW, full.summed_BcTHW)


def test_a_clip_can_be_generated_alone_from_cached_observations(model, features, text):
    schedule, condition = _schedule(), TextCondition.build(model, text[0])
    whole = generate(model, schedule, condition, GUIDED, 5)
    kv = condition.key_values(model)
    for clip in schedule.clips[:2]:
        forced = {step.real_scale_id: whole.bits[step.real_scale_id] for step in clip.steps}
        generate_clip(model, schedule, clip.index, kv, GUIDED, 0, forced, keep=schedule.scales_referred_to(clip.index))
    alone = generate_clip(model, schedule, 2, kv, GUIDED, 5)
    assert torch.equal(alone.summed_BcTHW, whole.summed_BcTHW[:, :, 3:])


def test_generating_before_its_references_are_cached_is_refused(model, text):
    kv = TextCondition.build(model, text[0]).key_values(model)
    with pytest.raises(MissingReferenceError, match="clip 0 scale 2 are needed but not held"):
        generate_clip(model, _schedule(), 1, kv, GUIDED, 0)


def test_short_negative_prompt_is_followed_by_zero_rows(model, text):
    rows = TextCondition.build(model, text[0], text[1, :2]).rows_RLC
    assert rows.shape == (2, 5, CONFIG.width)
    assert torch.equal(rows[1, 2:], torch.zeros(3, CONFIG.width))


def test_long_negative_prompt_is_cut_with_a_warning(model, text):
    with pytest.warns(UserWarning, match="only the first 3 are used"):
        cut = TextCondition.build(model, text[0, :3], text[1])
    assert torch.equal(cut.rows_RLC, TextCondition.build(model, text[0, :3], text[1, :3]).rows_RLC)


def test_text_that_does_not_fit_is_refused(model, text):
    with pytest.raises(ConfigError, match=r"1\.\.16 tokens, found 17"):
        TextCondition.build(model, torch.zeros(17, CONFIG.text_channels))
    with pytest.raises(ConfigError, match=r"features must be \[tokens, 12\]"):
        TextCondition.build(model, torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="needs 1 text rows, the text has 2"):
        generate(model, _schedule(), TextCondition.build(model, text[0]), UNGUIDED, 0)


def test_forced_bits_that_do_not_fit_are_refused(model, text):
    schedule, condition = _schedule(), TextCondition.build(model, text[0])
    with pytest.raises(ConfigError, match="leak of 3 scales needs the bits of 3 steps, found 1"):
        generate(model, schedule, condition, GUIDED, 0, forced_bits=[torch.zeros(1, 1, 1, 1, 4).bool()], leak=3)
    with pytest.raises(ConfigError, match=r"must be bool \[1, 1, 1, 1, 4\]"):
        generate(model, schedule, condition, GUIDED, 0, forced_bits=[torch.zeros(1, 1, 1, 1, 8).bool()])


def test_batched_encoding_equals_rows_one_by_one(features):
    schedule = _schedule(2)
    clip = schedule.clips[1]
    target = features[:, :, clip.frame_slice]
    bits, summed = encode_bits(target, clip, CONFIG)
    for row in range(2):
        one_bits, one_summed = encode_bits(target[row : row + 1], clip, CONFIG)
        assert torch.equal(summed[row : row + 1], one_summed)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(bits, one_bits, strict=True))


def test_labels_correct_earlier_flips(features):
    schedule = _schedule(1)
    clean, corrupted = _encode(schedule, features), _encode(schedule, features, strength=1.0)
    assert torch.equal(clean[0].label_bits_BLd, corrupted[0].label_bits_BLd)
    assert not torch.equal(clean[1].input_BLC, corrupted[1].input_BLC)
    assert not torch.equal(clean[2].label_bits_BLd, corrupted[2].label_bits_BLd)


def test_the_last_scale_of_a_schedule_is_never_flipped(features):
    schedule = _schedule(2)
    correction = SelfCorrection(schedule, 1.0, torch.Generator().manual_seed(0))
    last = schedule.clips[-1].steps[-1]
    assert correction.flips(last, (1, *last.thw, 8), features.device) is None
    other = schedule.clips[0].steps[-1]
    assert correction.flips(other, (1, *other.thw, 8), features.device) is not None


def test_every_repetition_is_drawn_and_rows_draw_apart(features):
    schedule = _schedule(2)
    correction = SelfCorrection(schedule, 0.3, torch.Generator().manual_seed(0))
    clip = schedule.clips[0]
    ids = torch.stack(
        [
            encode_for_training(features[:, :, clip.frame_slice], clip, CONFIG, correction)[1].real_scale_id_B
            for _ in range(20)
        ]
    )
    assert set(ids.flatten().tolist()) == {2, 3}
    assert bool((ids[:, 0] != ids[:, 1]).any())


def test_rows_may_have_their_own_rotation_table(model, features, text):
    schedule = _schedule()
    scales = _encode(schedule, features)
    latents = torch.cat([scale.input_BLC for scale in scales], 1)
    layout = lay_out([[RowLayout(schedule, 5)], [RowLayout(schedule, 5)]], CONFIG)
    with torch.no_grad():
        shared = model(latents, text, layout.rope_B2Ln[0], layout.mask.dense())
        own = model(latents, text, layout.rope_B2Ln, layout.mask.dense())
    assert torch.equal(shared, own)


def test_checkpointed_activations_give_the_same_gradients(model, features, text):
    schedule = _schedule()
    latents = torch.cat([scale.input_BLC for scale in _encode(schedule, features)], 1)
    layout = lay_out([[RowLayout(schedule, 5)], [RowLayout(schedule, 2)]], CONFIG)
    rope, mask = layout.rope_B2Ln, layout.mask.dense()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model(latents, text, rope, mask, checkpoint_activations=checkpointing).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    assert bool(gradients[0].isfinite().all())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_heads_and_codes_stay_fp32_under_autocast(model, features):
    clip = _schedule().clips[0]
    target = features[:, :, clip.frame_slice]
    expected = encode_bits(target, clip, CONFIG)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        hidden = model.embed_latents(torch.ones(1, 2, CONFIG.latent_channels))
        assert hidden.dtype == torch.bfloat16
        assert model.project_text(torch.ones(1, 2, CONFIG.text_channels)).dtype == torch.bfloat16  # one stream
        assert model.logits(hidden, semantic=True).dtype == torch.float32
        assert torch.equal(encode_bits(target, clip, CONFIG)[1], expected)


def test_bf16_blocks_run_and_cache_bf16(text):
    torch.manual_seed(0)
    model = WorldModel(CONFIG).cast_blocks(torch.bfloat16)
    condition = TextCondition.build(model, text[0])
    assert condition.key_values(model).text[0][0].dtype == torch.bfloat16
    result = generate(model, _schedule(), condition, GUIDED, 0)
    assert result.summed_BcTHW.dtype == torch.float32


def test_initial_weights_follow_the_specification():
    torch.manual_seed(0)
    model = WorldModel(msgspec.structs.replace(CONFIG, block_chunks=2, qkvo_bias=True))
    state = model.state_dict()
    assert "block_chunks.1.module.0.attn.q_proj.bias" in state
    assert not state["block_chunks.1.module.0.attn.q_proj.bias"].any()
    assert not state["sos_token"].any()
    assert abs(float(state["text_proj.weight"].std()) - 0.02) < 0.004
    assert all(bool((m.weight == 1).all()) for m in model.modules() if isinstance(m, RMSNorm))
    other = WorldModel(CONFIG)
    assert torch.equal(other.cfg_uncond, model.cfg_uncond)


def test_documents_see_what_the_rule_says():
    matrix = document_matrix(_schedule())
    text, padding = 9, 10
    assert matrix[:9, text].all()
    assert matrix[text].nonzero().flatten().tolist() == [text]
    assert matrix[padding].nonzero().flatten().tolist() == [padding]
    assert matrix[2].nonzero().flatten().tolist() == [2, text]  # image clip: no references
    assert matrix[7].nonzero().flatten().tolist() == [1, 5, 7, text]  # clip 2: (1, 2), (0, 1), itself
    everything = document_matrix(_schedule(context_from_largest_no=0))
    assert torch.equal(everything[:9, :9], torch.ones(9, 9).tril().bool())


def test_encoding_refuses_features_of_another_clip(features):
    with pytest.raises(ConfigError, match=r"needs features \[B, 8, 2, 3, 4\]"):
        encode_bits(features, _schedule().clips[1], CONFIG)


def test_resizes_agree_with_torch_and_carry_gradients():
    z = torch.randn(2, 4, 3, 2, 3, requires_grad=True)
    volumes = z.movedim(2, 1).flatten(0, 1)[:, None]

    def back(x):
        return x[:, 0].unflatten(0, (2, 3)).movedim(1, 2)

    up = torch.nn.functional.interpolate(volumes, (8, 5, 7), mode="trilinear")
    torch.testing.assert_close(resize_channels_trilinear(z, 8, (5, 7)), back(up), atol=1e-5, rtol=0)
    down = torch.nn.functional.adaptive_avg_pool3d(volumes, (2, 1, 2))
    ours = resize_channels_area(z, 2, (1, 2))
    torch.testing.assert_close(ours, back(down), atol=1e-6, rtol=0)
    ours.sum().backward()
    assert bool(z.grad.ne(0).all())


def test_codes_have_unit_length():
    codes = codes_of_bits(torch.rand(1, 2, 3, 3, 16) > 0.5)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(1, 2, 3, 3))


def test_guidance_of_weight_one_is_the_conditional_row():
    conditional, unconditional = torch.randn(2, 6, 4, 2), torch.randn(2, 6, 4, 2)
    torch.testing.assert_close(adaptive_projected_guidance(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(classifier_free_guidance(conditional, unconditional, 1.0), conditional)


def test_guidance_update_is_orthogonal_limited_and_per_sample():
    conditional, unconditional = torch.randn(2, 6, 4, 2), 10 * torch.randn(2, 6, 4, 2)
    guided = adaptive_projected_guidance(conditional, unconditional, 3.0)
    update = (guided - conditional).flatten(1) / 2
    assert bool(((update * conditional.flatten(1)).sum(1).abs() < 1e-4).all())
    assert bool((update.square().mean(1).sqrt() <= 0.05 + 1e-6).all())
    alone = adaptive_projected_guidance(conditional[1:], unconditional[1:], 3.0)
    torch.testing.assert_close(guided[1:], alone)
