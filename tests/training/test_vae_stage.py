"""VAE stages: terms sum over rows, can be left out one at a time, and train what they should."""

import msgspec
import numpy as np
import pytest
import torch
from memory_flights import MemoryFlights
from small_models import tiny_config
from torch import Tensor

from worldvln_edge.config import ConfigError
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.training.stages.row_plan import StageDataError
from worldvln_edge.training.stages.vae import LATENT_POWER, MotionReadouts, frames_to_video
from worldvln_edge.training.stages.vae_stage import (
    VaeConfig,
    VaeEncoderConfig,
    VaeEncoderStage,
    VaeEncoderWeights,
    VaeStage,
    VaeWeights,
)
from worldvln_edge.training.stages.vae_windows import measure_targets

pytestmark = pytest.mark.filterwarnings("ignore:.*are left out")
CONFIG = tiny_config()
FLIGHTS = MemoryFlights(CONFIG, (13, 9, 13, 5))
TARGETS = measure_targets(FLIGHTS, CONFIG)


def networks() -> tuple[VideoVAE, MotionReadouts]:
    torch.manual_seed(0)
    return VideoVAE(CONFIG.video_vae), MotionReadouts(CONFIG, columns=4)


def vae_stage(training: VaeConfig | None = None, **options) -> VaeStage:
    return VaeStage(*networks(), CONFIG, FLIGHTS, TARGETS, training or VaeConfig(window=5), seed=0, **options)


def encoder_stage(training: VaeEncoderConfig | None = None) -> VaeEncoderStage:
    return VaeEncoderStage(*networks(), CONFIG, FLIGHTS, TARGETS, training or VaeEncoderConfig(), seed=0)


def loss_of(stage, batches: list) -> Tensor:
    """What the trainer minimises: coefficient * sum of totals / sum of weights."""
    totals, weights = [stage.totals(b) for b in batches], [stage.weights(b) for b in batches]
    return sum(
        coefficient * sum(part[name] for part in totals) / sum(part[name] for part in weights)
        for name, coefficient in stage.coefficients.items()
    )


def gradients(stage, batches: list) -> dict[str, Tensor]:
    stage.network.zero_grad()
    loss_of(stage, batches).backward()
    return {name: p.grad.clone() for name, p in stage.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [vae_stage, encoder_stage])
def test_the_cut_into_micro_batches_does_not_matter(make):
    stage = make()
    together = gradients(stage, [stage.load(2, [0, 1, 2, 3])])
    apart = gradients(stage, [stage.load(2, [3]), stage.load(2, [1, 0]), stage.load(2, [2])])
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, atol=1e-5, rtol=1e-4)


def test_every_total_has_a_weight():
    for stage in (vae_stage(), vae_stage(VaeConfig(window=5, raw_share=1.0)), encoder_stage()):
        batch = stage.load(0, [0, 1, 2, 3])
        assert stage.totals(batch).keys() == stage.weights(batch).keys()
        assert stage.coefficients.keys() <= stage.weights(batch).keys()


@pytest.mark.parametrize("name", VaeWeights.__struct_fields__)
def test_a_term_can_be_left_out_alone(name: str):
    stage = vae_stage(VaeConfig(window=5, weights=msgspec.structs.replace(VaeWeights(), **{name: 0.0})))
    batch = stage.load(0, [0])
    assert name not in stage.coefficients
    assert name not in stage.totals(batch)
    assert stage.coefficients.keys() <= stage.totals(batch).keys()


def test_one_term_alone_gives_no_gradient_to_what_it_does_not_use():
    only_motion = VaeWeights(
        reconstruction=0, commitment=0, flow_codes=0, flow_features=0, motion_codes=1, motion_features=0
    )
    stage = vae_stage(VaeConfig(window=5, weights=only_motion))
    found = gradients(stage, [stage.load(0, [0, 2])])
    assert "readouts.codes_motion.weight" in found
    assert not any("decoder" in name or "features_" in name or "flow" in name for name in found)


def test_terms_are_those_of_the_formula():
    stage = vae_stage(VaeConfig(window=5, raw_share=1.0, scale_drop=0.0))
    batch = stage.load(0, [0])
    vae = stage.network["vae"]
    video = frames_to_video(batch.frames_BFHW3)
    raw = vae.raw_features(vae.encode(video)[0])
    pixels, _ = vae.decode(raw)
    totals = {name: total.detach() for name, total in stage.totals(batch).items()}
    assert float(totals["reconstruction"]) == pytest.approx(float((pixels - video).detach().square().mean()), rel=1e-5)
    assert float(totals["reconstruction_raw"]) == pytest.approx(float(totals["reconstruction"]), rel=1e-6)
    encoder = encoder_stage(VaeEncoderConfig(window=5))
    spread = encoder.totals(batch)["spread"].detach()
    assert float(spread) == pytest.approx(float((raw.detach().square().mean() - LATENT_POWER) ** 2), rel=1e-4)


def test_rows_take_the_path_that_the_config_says():
    raw_only = vae_stage(VaeConfig(window=5, raw_share=1.0, scale_drop=1.0)).load(0, [0, 1, 2, 3])
    assert raw_only.is_raw == [True] * 4
    assert all(1 <= kept < CONFIG.schedule.scales_per_clip for kept in raw_only.scales_kept)
    codes_only = vae_stage(VaeConfig(window=5, raw_share=0.0, scale_drop=0.0)).load(0, [0, 1, 2, 3])
    assert codes_only.is_raw == [False] * 4
    assert codes_only.scales_kept == [CONFIG.schedule.scales_per_clip] * 4


def test_draws_belong_to_epoch_and_row():
    stage = vae_stage()
    assert torch.equal(stage.load(1, [0, 2]).frames_BFHW3[1], stage.load(1, [2]).frames_BFHW3[0])
    assert any(not torch.equal(stage.load(e, [2]).frames_BFHW3, stage.load(0, [2]).frames_BFHW3) for e in range(1, 5))


def test_windows_carry_the_motion_of_their_frames():
    batch = encoder_stage(VaeEncoderConfig(window=13)).load(0, [2])
    assert np.array_equal(batch.frames_BFHW3[0], FLIGHTS.frames(2))
    expected = TARGETS.stats.normalise(FLIGHTS.deltas(2))[:, [0, 3, 4, 5]]
    np.testing.assert_allclose(batch.motion_BFc[0], expected, rtol=1e-6)


def test_flights_shorter_than_the_window_are_left_out():
    plan = vae_stage(VaeConfig(window=13, step_rows=1)).plan(0)
    assert sorted(micro for step in plan for micro in step) == [[0], [2]]


def test_the_warm_start_trains_the_encoder_alone_and_the_whole_stage_everything_that_is_used():
    encoder = encoder_stage()
    learning = {name for name, p in encoder.network.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in learning} == {"encoder", "proj_down", "codes_motion", "codes_flow"}
    assert gradients(encoder, [encoder.load(0, [0, 1])]).keys() == learning
    whole = vae_stage()
    learning = {name for name, p in whole.network.named_parameters() if p.requires_grad}
    assert not any("_two" in name for name in learning)
    assert gradients(whole, [whole.load(0, [0, 1, 2, 3])]).keys() == learning


def test_training_lowers_the_reconstruction_error_of_held_out_flights():
    held_out = MemoryFlights(CONFIG, (9, 9), seed=1)
    stage = vae_stage(VaeConfig(window=5), held_out=held_out)
    before = stage.validate()
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=4e-3)
    for epoch in range(40):
        optimiser.zero_grad()
        loss_of(stage, [stage.load(epoch, [0, 1, 2, 3])]).backward()
        optimiser.step()
    after = stage.validate()
    assert after["reconstruction"] < 0.8 * before["reconstruction"]
    assert after["unexplained"] < 0.8 * before["unexplained"]
    assert before.keys() == stage.coefficients.keys() | {"unexplained"}


def test_the_mean_image_explains_nothing_beyond_itself():
    """`unexplained` is 1 for a VAE that always says the mean image of the held-out flights."""
    held_out = MemoryFlights(CONFIG, (5, 5), seed=1)
    stage = vae_stage(held_out=held_out)
    mean = torch.stack([frames_to_video(torch.from_numpy(held_out.frames(row))[None]) for row in (0, 1)]).mean((0, 3))
    stage.network["vae"].decode_pixels = lambda features, codes: (mean[:, :, None], ())
    assert stage.validate()["unexplained"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("window", [4, 1, 6])
def test_windows_that_do_not_end_with_a_latent_frame_are_refused(window: int):
    with pytest.raises(ConfigError, match=r"window must be 1 \+ 2\*k frames"):
        vae_stage(VaeConfig(window=window))


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"vae.raw_share must be from 0 to 1"):
        VaeConfig(raw_share=1.5)
    with pytest.raises(ConfigError, match=r"vae.weights.commitment must be >= 0"):
        VaeConfig(weights=VaeWeights(commitment=-1))
    with pytest.raises(ConfigError, match="all 0"):
        VaeEncoderConfig(weights=VaeEncoderWeights(flow_codes=0, motion_codes=0, spread=0))
    with pytest.raises(msgspec.ValidationError, match="unknown field `perceptual`"):
        msgspec.convert({"weights": {"perceptual": 1.0}}, VaeConfig)
    vae, _ = networks()
    with pytest.raises(ConfigError, match="4 columns of the motions move"):
        VaeStage(vae, MotionReadouts(CONFIG, columns=6), CONFIG, FLIGHTS, TARGETS, VaeConfig(window=5), seed=0)


def test_flights_that_teach_nothing_are_named():
    mixed = MemoryFlights(CONFIG, (9, 9))
    mixed.motions[1] = None
    stage = VaeStage(*networks(), CONFIG, mixed, measure_targets(mixed, CONFIG), VaeConfig(window=5), seed=0)
    with pytest.raises(StageDataError, match="memory row 1 has no recorded motion"):
        stage.load(0, [0, 1])
    with pytest.raises(StageDataError, match="none of 4 flights has the 17 frames"):
        vae_stage(VaeConfig(window=17))


def test_held_out_flights_without_motion_are_named_before_the_first_step():
    still = MemoryFlights(CONFIG, (9, 9), has_motion=False)
    with pytest.raises(StageDataError, match="vae: memory row 0 has no recorded motion"):
        vae_stage(held_out=still)
    weights = VaeWeights(motion_codes=0.0, motion_features=0.0)
    assert "unexplained" in vae_stage(VaeConfig(window=5, weights=weights), held_out=still).validate()


def test_held_out_flights_that_are_all_too_short_are_told():
    with pytest.warns(UserWarning, match="vae: none of 2 held-out flights has the 5 frames that it needs"):
        assert vae_stage(held_out=MemoryFlights(CONFIG, (1, 1))).validate() == {}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_flights_without_motion_teach_everything_but_motion():
    still = MemoryFlights(CONFIG, (9, 9), has_motion=False)
    targets = measure_targets(still, CONFIG)
    vae, _ = networks()
    readouts = MotionReadouts(CONFIG, int(targets.moving.sum()))
    with pytest.raises(StageDataError, match=r"no recorded motion that moves.*vae.weights to 0"):
        VaeStage(vae, readouts, CONFIG, still, targets, VaeConfig(window=5), seed=0)
    weights = VaeWeights(motion_codes=0.0, motion_features=0.0)
    stage = VaeStage(
        vae, readouts, CONFIG, still, targets, VaeConfig(window=5, weights=weights), seed=0, held_out=still
    )
    assert torch.isfinite(loss_of(stage, [stage.load(0, [0, 1])]))
    assert {"unexplained", "flow_codes"} <= stage.validate().keys()
