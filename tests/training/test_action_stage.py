"""Action stage: labels, schedules, what is frozen, the chunked backward pass, and what validation reports."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from memory_flights import MemoryFlights
from small_models import random_model, tiny_config
from torch import Tensor

from worldvln_edge.action_windows import LabelStats, average_windows, context_frame, window_starts
from worldvln_edge.config import ConfigError
from worldvln_edge.models.action_decoder import LatentActionHead
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.action_stage import ActionStage, ActionStageConfig
from worldvln_edge.training.stages.decoder_features import DecodedFlight, DecoderFeatures, observed_codes
from worldvln_edge.training.stages.flight_windows import draw_windows, gather_run, segment_runs, whole_run
from worldvln_edge.training.stages.motion_loss import MotionSchedule, Ramp, motion_terms
from worldvln_edge.training.stages.row_plan import StageDataError
from worldvln_edge.training.stages.shuffled_flights import ShuffledFlights, shuffled_frames
from worldvln_edge.training.stages.vae import frames_to_video
from worldvln_edge.training.trainer.stage import best_metric, parameter_groups, start_epoch

CONFIG = tiny_config(clips_per_segment=2, left_context=3)
MODEL = random_model(CONFIG)
FRAMES, STEP = CONFIG.horizon.num_frames, CONFIG.horizon.step
WINDOW = CONFIG.action_decoder.latent_head.window
FLAT = MotionSchedule(rotation=Ramp(start=1.0, end=1.0), z=Ramp(start=1.0, end=1.0))


class NoisyPredictor:
    """Predicts the true latents with noise of the row's own generator: other codes, no world model."""

    def digest(self, instruction: str) -> str:
        return "noisy"

    def predict(self, latents_BCTHW, schedule, instructions, generators) -> Tensor:
        noise = torch.stack([torch.randn(latents_BCTHW.shape[1:], generator=own) for own in generators])
        return (latents_BCTHW + noise)[:, :, 1:]


class PictureFeatures(DecoderFeatures):
    """Features in which the light of the pictures is plain to see, as a trained VAE would give them."""

    def _compute(self, rows: list[int]) -> list[DecodedFlight]:
        mixed = torch.randn(CONFIG.video_vae.feature_channels, 3, generator=torch.Generator().manual_seed(0))
        flights = []
        for row in rows:
            video = torch.from_numpy(self.flights.frames(row)).permute(3, 0, 1, 2).float() / 127.5 - 1
            features = torch.einsum("cr,rfhw->cfhw", mixed, F.avg_pool3d(video, (1, 2, 2))).half()
            flights.append(DecodedFlight(true=features, predicted=features[:, 1:] + 0.01))
        return flights


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Callable[..., DecoderFeatures]:
    folder = tmp_path_factory.mktemp("features")

    def features(flights: MemoryFlights, **options) -> DecoderFeatures:
        result = DecoderFeatures(folder, flights, MODEL.vae, CONFIG, **options)
        result.prepare(batch=2)
        return result

    return features


@pytest.fixture(scope="module")
def flights() -> MemoryFlights:
    return MemoryFlights(CONFIG, (FRAMES, FRAMES, 9, FRAMES))


def new_head(seed: int = 0) -> LatentActionHead:
    torch.manual_seed(seed)
    head = LatentActionHead(CONFIG.action_decoder, CONFIG.video_vae.feature_channels, time_embed_std=0.7)
    return head.eval()  # without stochastic depth


def loss_of(stage: ActionStage, batches: list) -> Tensor:
    """What the trainer minimises: coefficient * sum of totals / sum of weights."""
    totals = [stage.totals(batch) for batch in batches]
    weights = [stage.weights(batch) for batch in batches]
    loss = torch.zeros(())
    for name, coefficient in stage.coefficients.items():
        numerator = sum(part[name] for part in totals if name in part)
        loss = loss + coefficient * numerator / sum(part.get(name, 0) for part in weights)
    return loss


def motion_loss(predicted: Tensor, target: Tensor, *, rotation: float, z: float) -> Tensor:
    """The formula of spec/training.md 4.3, over all windows."""
    weights = {"rotation": rotation, "xy": 1.0, "z": z}
    return sum(weights[name] * term.mean() for name, term in motion_terms(predicted, target).items())


def gradients(stage: ActionStage, batches: list) -> dict[str, Tensor]:
    stage.network.zero_grad()
    loss_of(stage, batches).backward()
    return {name: p.grad.clone() for name, p in stage.network.named_parameters() if p.grad is not None}


def test_terms_are_means_over_their_columns():
    predicted, target = torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)
    target[0, :, 0], target[0, :, 3], target[0, :, 5] = 3.0, 2.0, 1.0
    terms = {name: values.tolist() for name, values in motion_terms(predicted, target).items()}
    assert terms == {"rotation": [3.0, 0.0], "xy": [2.0, 0.0], "z": [1.0, 0.0]}


@pytest.mark.golden
def test_labels_windows_loss_and_rotation_weight_are_the_golden_ones(golden):
    arrays = np.load(golden("training") / "labels.npz")
    stats = LabelStats(**{name: tuple(arrays[name]) for name in ("mean_angles", "std_angles", "mean_t", "std_t")})
    labels = stats.normalise(arrays["delta_rad_m"])
    np.testing.assert_allclose(labels, arrays["delta_normalized"], atol=1e-5)
    for stride in (1, 3):
        starts = window_starts(len(labels), 4, stride)
        assert starts == arrays[f"window_starts_stride{stride}"].tolist()
        targets = np.stack([labels[s + 1 : s + 4] for s in starts])
        np.testing.assert_allclose(targets.reshape(-1, 18), arrays[f"window_targets_stride{stride}"], atol=1e-5)
    predicted, target = (
        torch.from_numpy(arrays[name]).unflatten(1, (3, 6)) for name in ("window_pred", "window_targets_stride1")
    )
    loss = motion_loss(predicted, target, rotation=0.25, z=2.0)
    assert float(loss) == pytest.approx(float(arrays["stage_b_loss_rot0p25_xy1_z2"]), abs=1e-5)
    weights = [MotionSchedule().at(epoch) for epoch in range(30)]
    np.testing.assert_allclose([w["rotation"] for w in weights], arrays["rot_weight_epoch_1to30"], rtol=1e-9)
    assert {(w["xy"], w["z"]) for w in weights} == {(1.0, 2.0)}


def test_statistics_are_those_of_all_motions_of_the_training_flights(kept, flights):
    stats = ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0).stats
    rows = np.concatenate(flights.motions).astype(np.float64)
    np.testing.assert_allclose(stats.mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.std[[0, 3, 4, 5]], rows.std(0)[[0, 3, 4, 5]], rtol=1e-5)
    np.testing.assert_allclose(stats.std[1:3], 1e-6)  # the floor: nothing pitches or rolls
    np.testing.assert_allclose(stats.denormalise(stats.normalise(rows)), rows, atol=1e-6)


def test_loss_is_that_of_the_formula_over_all_windows(kept, flights):
    stage = ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0)
    batch = stage.load(0, [0, 2])
    expected = []
    for row in (0, 2):
        features = kept(flights).load(row).true.float()
        with torch.no_grad():
            predicted = new_head()(features[None]).unflatten(-1, (WINDOW - 1, 6))
        labels = torch.from_numpy(stage.stats.normalise(flights.deltas(row)))
        target = torch.stack([labels[s : s + WINDOW - 1] for s in range(len(predicted))])
        expected.append(motion_loss(predicted, target, rotation=0.05, z=2.0))
    # Flights of different length count alike.
    assert float(loss_of(stage, [batch]).detach()) == pytest.approx(float(sum(expected) / 2), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_chunked_backward_equals_one_joint_backward(kept, flights, share: float):
    features = kept(flights, predictor=NoisyPredictor())
    grads = []
    for frames_chunk, windows_chunk in ((0, 0), (2, 5)):
        config = ActionStageConfig(
            frames_chunk=frames_chunk,
            windows_chunk=windows_chunk,
            predicted_share=share,
            freeze_adapter_epochs=0,
            endpoint=0.1,
        )
        stage = ActionStage(new_head(), CONFIG, features, config, seed=0)
        grads.append(gradients(stage, [stage.load(0, [0, 1, 2])]))
    joint, chunked = grads
    assert joint.keys() == chunked.keys()
    assert any(name.startswith("head.adapter") for name in joint)
    for name, gradient in joint.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-5, rtol=1e-5)


def test_the_cut_into_micro_batches_does_not_matter(kept, flights):
    features = kept(flights, predictor=NoisyPredictor())
    config = ActionStageConfig(windows=3, predicted_share=0.5, freeze_adapter_epochs=0)
    stage = ActionStage(new_head(), CONFIG, features, config, seed=0)
    together = gradients(stage, [stage.load(0, [0, 1, 2])])
    apart = gradients(stage, [stage.load(0, [2]), stage.load(0, [0]), stage.load(0, [1])])
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, atol=1e-6, rtol=1e-5)


def test_draws_belong_to_seed_epoch_and_row(kept, flights):
    features = kept(flights, predictor=NoisyPredictor())
    config = ActionStageConfig(windows=4, predicted_share=0.5)
    stage = ActionStage(new_head(), CONFIG, features, config, seed=0)
    assert stage.load(3, [0, 1])[1].runs == stage.load(3, [1])[0].runs
    assert stage.load(4, [1])[0].runs != stage.load(3, [1])[0].runs
    assert ActionStage(new_head(), CONFIG, features, config, seed=1).load(3, [1])[0].runs != stage.load(3, [1])[0].runs


def test_an_epoch_has_every_long_enough_row_once(kept):
    flights = MemoryFlights(CONFIG, (FRAMES, 1, 9, FRAMES), seed=1)
    config = ActionStageConfig(step_rows=2, micro_rows=1)
    with pytest.warns(UserWarning, match=r"action: 1 of 4 flights have fewer than the 3 frames .*first memory row 1"):
        plan = ActionStage(new_head(), CONFIG, kept(flights), config, seed=0).plan(0)
    assert [len(step) for step in plan] == [2, 1]
    assert sorted(row for step in plan for micro in step for row in micro) == [0, 2, 3]


def test_runs_of_segments_are_those_that_serving_looks_at():
    runs = segment_runs(FRAMES, CONFIG)
    assert len(runs) == CONFIG.horizon.segments
    for run, (observed, following) in zip(
        runs, zip(CONFIG.horizon.points, CONFIG.horizon.points[1:], strict=False), strict=True
    ):
        assert run.first + 1 == context_frame(observed, 3)
        assert run.first + run.count == following
        assert run.observed + 1 == observed
    assert segment_runs(STEP, CONFIG) == []


def test_gathered_frames_are_true_up_to_the_observed_one():
    true, predicted = torch.arange(FRAMES)[None], 100 + torch.arange(1, FRAMES)[None]
    for run in segment_runs(FRAMES, CONFIG):
        found = gather_run(true, predicted, run)[0].tolist()
        assert found == [f if f <= run.observed else 100 + f for f in run.frames.tolist()]
    assert gather_run(true, None, whole_run(FRAMES))[0].tolist() == list(range(FRAMES))


def test_drawn_windows_cover_a_flight_and_its_segments():
    generator = torch.Generator().manual_seed(0)
    windows = draw_windows(FRAMES, CONFIG, window=WINDOW, count=800, predicted_share=0.5, generator=generator)
    allowed = {run.cut(s, WINDOW) for run in segment_runs(FRAMES, CONFIG) for s in range(run.count - WINDOW + 1)}
    whole = {whole_run(FRAMES).cut(s, WINDOW) for s in range(FRAMES - WINDOW + 1)}
    assert set(windows) == allowed | whole
    short = draw_windows(STEP, CONFIG, window=WINDOW, count=50, predicted_share=1.0, generator=generator)
    assert not any(window.has_predictions for window in short)


def test_freezing_follows_the_epochs_and_rates_the_config(kept, flights):
    config = ActionStageConfig(freeze_adapter_epochs=2, freeze_backbone_epochs=1)
    stage = ActionStage(new_head(), CONFIG, kept(flights), config, seed=0)
    batch = stage.load(0, [2])

    def learning(epoch: int) -> set[str]:
        start_epoch(stage, epoch)
        return {".".join(name.split(".")[1:3]) for name in gradients(stage, [batch])}

    assert learning(0) == {"tsformer.head"}
    assert "tsformer.blocks" in learning(1)
    assert not any(name.startswith("adapter") for name in learning(1))
    assert "adapter.conv_a" in learning(2)
    assert not any("patch_embed" in name for name in learning(2))
    start_epoch(stage, 0)
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in stage.network.named_parameters()}
    stage.network.zero_grad()
    loss_of(stage, [batch]).backward()
    optimiser.step()
    moved = {name for name, p in stage.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head.tsformer.head.weight", "head.tsformer.head.bias"}
    assert len(optimiser.state) == 2
    rates = {id(p): group.rate for group in parameter_groups(stage) for p in group.parameters}
    head = stage.network["head"]
    assert rates[id(head.tsformer.head.weight)] == 10
    assert rates[id(head.adapter.patch.weight)] == 2
    assert rates[id(head.tsformer.pos_embed)] == 1
    assert len(rates) == len(list(stage.network.parameters()))


def test_the_decoder_learns_only_with_a_rate_and_after_its_epochs(kept, flights):
    frozen = ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0, vae=MODEL.vae)
    assert set(frozen.network) == {"head"}
    config = ActionStageConfig(vae_rate=0.5, freeze_vae_epochs=1, freeze_adapter_epochs=0)
    stage = ActionStage(new_head(), CONFIG, kept(flights, keep="codes"), config, seed=0, vae=MODEL.vae)
    batch = stage.load(0, [2])
    assert not any(name.startswith(("decoder", "proj_up")) for name in gradients(stage, [batch]))
    start_epoch(stage, 1)
    found = gradients(stage, [batch])
    assert {"decoder.conv_in.conv.weight", "proj_up.weight"} <= found.keys()
    MODEL.vae.requires_grad_(False)
    assert all(not p.requires_grad for p in MODEL.vae.encoder.parameters())


def test_codes_and_features_give_one_loss(kept, flights):
    losses = []
    for keep in ("features", "codes"):
        features = kept(flights, keep=keep, predictor=NoisyPredictor())
        stage = ActionStage(new_head(), CONFIG, features, ActionStageConfig(predicted_share=1.0), seed=0)
        losses.append(float(loss_of(stage, [stage.load(0, [0])]).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # features are kept in float16


def test_training_lowers_the_loss_and_validation_sees_it(flights, tmp_path):
    config = ActionStageConfig(windows=8, weights=FLAT, head_rate=1.0, freeze_adapter_epochs=0, predicted_share=0.3)
    features = PictureFeatures(tmp_path, flights, MODEL.vae, CONFIG, predictor=NoisyPredictor())
    features.prepare()
    shuffled = PictureFeatures(tmp_path, ShuffledFlights(flights), MODEL.vae, CONFIG)
    shuffled.prepare()
    stage = ActionStage(new_head().train(), CONFIG, features, config, seed=0, held_out=features, shuffled=shuffled)
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=4e-3)
    before = _evaluated(stage)
    for epoch in range(80):
        optimiser.zero_grad()
        loss_of(stage, [stage.load(epoch, [0, 1, 2, 3])]).backward()
        optimiser.step()
    after = _evaluated(stage)
    assert before["nmse_x"] > 0.9
    assert after["nmse_x"] < 0.6
    assert after["predicted_nmse_x"] < 0.6
    assert after["shuffled_nmse_x"] > 0.9
    for name in ("endpoint_m", "endpoint_m_p90", "yaw_deg", "qualified", "mean_endpoint_m", "mae_z"):
        assert {name, f"segment_{name}", f"predicted_{name}"} <= after.keys()
    assert "nmse_roll" not in after  # nothing rolls
    assert stage.best_metric == "predicted_endpoint_m"


def test_the_control_shows_videos_whose_frames_lost_their_order(kept, flights):
    """Not features in another order: the motion that the VAE saw in a clip would still be in each of them."""
    shuffled = kept(ShuffledFlights(flights))
    stage = ActionStage(
        new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0, held_out=kept(flights), shuffled=shuffled
    )
    head, errors, of_mean = new_head(), [], []
    for row in range(len(flights)):
        video = flights.frames(row)[shuffled_frames(row, len(flights.frames(row))).numpy()]
        assert not np.array_equal(video, flights.frames(row))
        with torch.no_grad():
            latents = MODEL.vae.raw_features(MODEL.vae.encode(frames_to_video(torch.from_numpy(video)[None]))[0])
            codes = observed_codes(latents, ScaleSchedule(CONFIG.schedule, latents.shape[2]), CONFIG)
            logits = head(MODEL.vae.decode_features(codes)[0].half().float())
        deltas = stage.stats.denormalise(logits.unflatten(-1, (WINDOW - 1, 6)).numpy())
        found = average_windows(deltas, window_starts(len(video), WINDOW), len(video))[1:]
        errors.append((found[:, 3] - flights.deltas(row)[:, 3]) ** 2)
        of_mean.append((stage.stats.mean[3] - flights.deltas(row)[:, 3]) ** 2)
    wanted = np.concatenate(errors).mean() / np.concatenate(of_mean).mean()
    assert _evaluated(stage)["shuffled_nmse_x"] == pytest.approx(wanted, rel=1e-3)


def test_without_the_control_nothing_stands_in_for_it(kept, flights):
    stage = ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0, held_out=kept(flights))
    assert not [name for name in _evaluated(stage) if name.startswith("shuffled")]


def _evaluated(stage: ActionStage) -> dict[str, float]:
    stage.network.eval()
    metrics = dict(stage.validate())
    stage.network.train()
    return metrics


def test_the_best_state_is_that_of_the_nearest_endpoints(kept, flights):
    stage = ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0, held_out=kept(flights))
    assert best_metric(stage) == "endpoint_m"
    assert "endpoint_m" in _evaluated(stage)


def test_without_held_out_flights_there_are_no_metrics(kept, flights):
    assert ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(), seed=0).validate() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_rows": 0}, "step_rows must be >= 1"),
        ({"windows_chunk": -1}, "windows_chunk must be >= 0"),
        ({"predicted_share": 1.5}, "from 0 to 1"),
        ({"windows": 2, "endpoint": 1.0}, "needs all windows"),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ActionStageConfig(**change)


def test_an_unknown_option_is_refused():
    with pytest.raises(msgspec.ValidationError, match="unknown field `window`"):
        msgspec.convert({"window": 3}, ActionStageConfig)


def test_weights_below_zero_and_a_ramp_without_epochs_are_refused():
    with pytest.raises(ConfigError, match=r"weights.xy must be >= 0"):
        MotionSchedule(xy=-1.0)
    with pytest.raises(ConfigError, match="weights >= 0"):
        Ramp(start=-1.0, end=1.0)
    with pytest.raises(ConfigError, match="epochs >= 1"):
        Ramp(start=0.0, end=1.0, epochs=0)


def test_options_that_need_other_features_are_refused(kept, flights):
    with pytest.raises(ConfigError, match="predictor"):
        ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(predicted_share=0.5), seed=0)
    with pytest.raises(ConfigError, match="keep codes"):
        ActionStage(new_head(), CONFIG, kept(flights), ActionStageConfig(vae_rate=1.0), seed=0, vae=MODEL.vae)


def test_flights_that_teach_nothing_are_named(kept):
    still = MemoryFlights(CONFIG, (FRAMES,), seed=2, has_motion=False)
    with pytest.raises(StageDataError, match="memory row 0 has no recorded motion"):
        ActionStage(new_head(), CONFIG, kept(still), ActionStageConfig(), seed=0)
    fine = kept(MemoryFlights(CONFIG, (9,), seed=5))
    with pytest.raises(StageDataError, match="memory row 0 has no recorded motion"):
        ActionStage(new_head(), CONFIG, fine, ActionStageConfig(), seed=0, held_out=kept(still))
    short = MemoryFlights(CONFIG, (1, 1), seed=3)
    with pytest.raises(StageDataError, match="none of 2 flights has the 3 frames"):
        ActionStage(new_head(), CONFIG, kept(short), ActionStageConfig(), seed=0)
    broken = MemoryFlights(CONFIG, (9,), seed=4)
    broken.motions[0][3, 3] = np.nan
    with pytest.raises(StageDataError, match="memory row 0 must be 8 rows of 6 finite numbers"):
        ActionStage(new_head(), CONFIG, kept(broken), ActionStageConfig(), seed=0)
