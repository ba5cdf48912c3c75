"""Adapter stage: the exact loss and its schedule, chunks, windows of latents, and the held-out cosine."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from memory_flights import MemoryFlights
from small_models import random_model, tiny_config
from torch import Tensor

from worldvln_edge.config import AdapterConfig, ConfigError, TimesFormerConfig
from worldvln_edge.images import rgb_head_input
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.timesformer import PatchEmbed
from worldvln_edge.training.stages.adapter import AdapterStage, AdapterStageConfig
from worldvln_edge.training.stages.decoder_features import DecoderFeatures
from worldvln_edge.training.stages.distillation import DistillationWeights, distillation_terms
from worldvln_edge.training.stages.row_plan import StageDataError
from worldvln_edge.training.trainer.stage import row_generator, start_epoch

CONFIG = tiny_config()
MODEL = random_model(CONFIG)
HEAD = TimesFormerConfig(image_hw=(16, 24), patch=8, width=16, depth=2, heads=2, window=4)
DECODER = msgspec.structs.replace(
    CONFIG.action_decoder,
    adapter=AdapterConfig(resize_hw=(8, 12), hidden=8, groups=4, patch=4),
    latent_head=HEAD,
    rgb_head=HEAD,
)
FLIGHTS = MemoryFlights(CONFIG, (13, 9, 13))
STRIDE = CONFIG.video_vae.temporal_stride


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Callable[..., DecoderFeatures]:
    folder = tmp_path_factory.mktemp("features")

    def features(flights: MemoryFlights = FLIGHTS, **options) -> DecoderFeatures:
        result = DecoderFeatures(folder, flights, MODEL.vae, CONFIG, **options)
        result.prepare()
        return result

    return features


def teacher() -> PatchEmbed:
    torch.manual_seed(5)
    return PatchEmbed(HEAD)


def adapter_stage(features: DecoderFeatures, training: AdapterStageConfig | None = None, **options) -> AdapterStage:
    torch.manual_seed(0)
    adapter = Adapter(DECODER.adapter, CONFIG.video_vae.feature_channels, HEAD.width)
    return AdapterStage(
        adapter,
        teacher(),
        DECODER,
        features,
        training or AdapterStageConfig(),
        temporal_stride=STRIDE,
        seed=0,
        **options,
    )


def loss_of(stage: AdapterStage, batches: list) -> Tensor:
    totals, weights = [stage.totals(b) for b in batches], [stage.weights(b) for b in batches]
    return sum(
        coefficient * sum(part[name] for part in totals) / sum(part[name] for part in weights)
        for name, coefficient in stage.coefficients.items()
    )


def gradients(stage: AdapterStage, batches: list) -> dict[str, Tensor]:
    stage.network.zero_grad()
    loss_of(stage, batches).backward()
    return {name: p.grad.clone() for name, p in stage.network.named_parameters()}


@pytest.mark.golden
def test_terms_totals_and_schedule_are_the_golden_ones(golden):
    arrays = np.load(golden("training") / "stage_a_distill.npz")
    student, teacher_ = (torch.from_numpy(arrays[name]).flatten(0, 2) for name in ("student", "teacher"))
    terms = distillation_terms(student, teacher_)
    for name, term in terms.items():
        assert float(term) == pytest.approx(float(arrays[f"part_{name}"]), rel=1e-9)
    weights = dict(zip(("cos", "mean", "std", "mse"), arrays["w_cos_mean_std_mse"], strict=True))
    assert float(sum(weights[n] * t for n, t in terms.items())) == pytest.approx(float(arrays["total_all"]), rel=1e-9)
    default = DistillationWeights().at(0)
    total = sum(default[name] * terms[name] for name in default)
    assert float(total) == pytest.approx(float(arrays["total_default_cos1_mse0p1"]), rel=1e-9)
    schedule = [DistillationWeights().at(epoch) for epoch in range(60)]
    expected = arrays["epoch_weights_cos_mse_1to60"]
    np.testing.assert_allclose([[w["cos"], w["mse"]] for w in schedule], expected, rtol=1e-9)


def test_a_term_of_weight_zero_is_skipped_and_a_single_token_has_no_spread():
    assert DistillationWeights(schedule="none", mse=0.0).at(70) == {"cos": 1.0}
    one = torch.ones(1, 4)
    assert "std" not in distillation_terms(one, one)
    assert distillation_terms(one, one, ("mse",)).keys() == {"mse"}


def test_the_teacher_is_the_patch_embedding_of_the_frames(kept):
    stage = adapter_stage(kept())
    batch = stage.load(0, [1])
    frames = list(FLIGHTS.frames(1))
    images = torch.from_numpy(rgb_head_input(frames, HEAD.image_hw, DECODER.rgb_mean, DECODER.rgb_std))
    with torch.no_grad():
        wanted = teacher()(images).flatten(0, 1)
        found = stage.network(kept().load(1).true.float()[None]).flatten(0, 1)
    expected = distillation_terms(found, wanted, ("cos", "mse"))
    totals = stage.totals(batch)
    assert totals.keys() == {"cos", "mse"} == stage.weights(batch).keys()
    for name, value in expected.items():
        torch.testing.assert_close(totals[name].detach(), value)


def test_chunks_and_micro_batches_do_not_matter(kept):
    whole = adapter_stage(kept(), AdapterStageConfig(frames_chunk=0))
    chunked = adapter_stage(kept(), AdapterStageConfig(frames_chunk=2))
    joint = gradients(whole, [whole.load(0, [0, 1, 2])])
    apart = gradients(chunked, [chunked.load(0, [2, 0]), chunked.load(0, [1])])
    for name, gradient in joint.items():
        torch.testing.assert_close(apart[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_flight_that_lacks_a_term_leaves_that_of_the_others(kept, monkeypatch):
    """As a flight of a single token lacks the spread."""
    stage = adapter_stage(kept(), AdapterStageConfig(weights=DistillationWeights(std=1.0)))
    alone = stage.totals(stage.load(0, [0]))
    tokens = [frames * HEAD.grid_hw[0] * HEAD.grid_hw[1] for frames in (13, 9)]

    def without_spread(student_MD, teacher_MD, names):
        assert len(student_MD) in tokens
        terms = distillation_terms(student_MD, teacher_MD, names)
        return terms if len(student_MD) == tokens[0] else {name: terms[name] for name in terms.keys() - {"std"}}

    monkeypatch.setattr("worldvln_edge.training.stages.adapter.distillation_terms", without_spread)
    torch.testing.assert_close(stage.totals(stage.load(0, [0, 1]))["std"], alone["std"])


def test_the_schedule_changes_the_coefficients(kept):
    stage = adapter_stage(kept())
    assert dict(stage.coefficients) == {"cos": 1.0, "mse": 0.1}
    start_epoch(stage, 59)
    assert stage.coefficients == pytest.approx({"cos": 0.1, "mse": 1.0})


def test_neither_the_teacher_nor_the_head_that_it_comes_from_is_trained(kept):
    embed = teacher()
    adapter = Adapter(DECODER.adapter, CONFIG.video_vae.feature_channels, HEAD.width)
    stage = AdapterStage(adapter, embed, DECODER, kept(), AdapterStageConfig(), temporal_stride=STRIDE, seed=0)
    loss_of(stage, [stage.load(0, [1])]).backward()
    assert all(p.grad is None and p.requires_grad for p in embed.parameters())  # the RGB head may still learn
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_latent_window_is_decoded_alone_and_compared_with_its_own_frames(kept):
    stage = adapter_stage(kept(keep="codes"), AdapterStageConfig(latent_window=3))
    seen = set()
    for epoch in range(12):
        batch = stage.load(epoch, [0])
        generator = row_generator(0, epoch, 0)
        start = int(torch.randint(7 - 3 + 1, (), generator=generator))
        first = 0 if start == 0 else STRIDE * start - (STRIDE - 1)
        frames = list(FLIGHTS.frames(0)[first : first + 1 + 2 * STRIDE])
        images = rgb_head_input(frames, HEAD.image_hw, DECODER.rgb_mean, DECODER.rgb_std)
        np.testing.assert_array_equal(batch.images[0], images)
        assert torch.equal(batch.flights[0].true, kept(keep="codes").load(0).true[:, start : start + 3])
        assert torch.isfinite(stage.totals(batch)["cos"])
        seen.add(start)
    assert len(seen) > 2


def test_training_raises_the_held_out_cosine(kept):
    held_out = MemoryFlights(CONFIG, (9,), seed=1)
    stage = adapter_stage(kept(), held_out=kept(held_out))
    before = stage.validate()
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=1e-2)
    for epoch in range(40):
        optimiser.zero_grad()
        loss_of(stage, [stage.load(epoch, [0, 1, 2])]).backward()
        optimiser.step()
    after = stage.validate()
    assert after["cosine"] > before["cosine"] + 0.2
    assert after["cosine_worst"] <= after["cosine_p10"] <= 1
    assert after["mse"] < before["mse"]


def test_the_held_out_cosine_is_that_of_the_tokens(kept):
    stage = adapter_stage(kept(), held_out=kept())
    images = [
        torch.from_numpy(rgb_head_input(list(FLIGHTS.frames(r)), HEAD.image_hw, DECODER.rgb_mean, DECODER.rgb_std))
        for r in range(3)
    ]
    with torch.no_grad():
        wanted = torch.cat([teacher()(part) for part in images])
        found = torch.cat([stage.network(kept().load(r).true.float()[None]) for r in range(3)])
    assert stage.validate()["cosine"] == pytest.approx(
        float(F.cosine_similarity(found, wanted, dim=-1).mean()), abs=1e-5
    )
    assert adapter_stage(kept()).validate() == {}


def test_what_cannot_be_distilled_is_refused(kept):
    with pytest.raises(ConfigError, match=r"adapter.step_rows must be >= 1"):
        AdapterStageConfig(step_rows=0)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"weights": {"huber": 1.0}}, AdapterStageConfig)
    with pytest.raises(ConfigError, match="keep codes"):
        adapter_stage(kept(), AdapterStageConfig(latent_window=3))
    adapter = Adapter(CONFIG.action_decoder.adapter, 8, 24)
    with pytest.raises(ConfigError, match="both heads must agree"):
        AdapterStage(
            adapter, teacher(), CONFIG.action_decoder, kept(), AdapterStageConfig(), temporal_stride=STRIDE, seed=0
        )
    with pytest.raises(StageDataError, match="none of 3 flights has the 19 frames"):
        adapter_stage(kept(keep="codes"), AdapterStageConfig(latent_window=10))
