"""Video VAE training: what is quantised, what is dropped, where the gradient goes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import random_frames, random_model, tiny_config

from worldvln_edge.config import ConfigError
from worldvln_edge.models.quantizer import add_codes, encode_bits
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.flight_data import FlightSet
from worldvln_edge.training.stages.loop import OptimiserConfig
from worldvln_edge.training.stages.vae import (
    MotionReadouts,
    VaeTrainingConfig,
    encode_flights,
    frames_to_video,
    quantise_straight_through,
    train_vae,
)

CONFIG = tiny_config()
SCHEDULE = ScaleSchedule(CONFIG.schedule, 5)
SCALES = CONFIG.schedule.scales_per_clip


@pytest.fixture(scope="module")
def flights() -> FlightSet:
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(6, 12, 6)).astype(np.float32)
    deltas[..., 1:3] = 0  # pitch and roll never move, as in the simulator's flights
    return FlightSet(
        frames=np.stack([np.stack(random_frames(CONFIG, 13, seed=i)) for i in range(6)]),
        deltas=deltas,
        instructions=("fly forward",) * 6,
    )


def _features(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 16, 5, *CONFIG.schedule.latent_hw, generator=torch.Generator().manual_seed(0))


def test_gradient_passes_the_quantiser_unchanged():
    features = _features().requires_grad_()
    codes, full = quantise_straight_through(features, SCHEDULE, CONFIG, [SCALES, 1, 2])
    upstream = torch.randn_like(codes)
    (gradient,) = torch.autograd.grad(codes, features, upstream)
    assert torch.equal(gradient, upstream)
    assert not full.requires_grad


def test_kept_scales_are_the_coarse_ones_of_every_clip():
    features = _features()
    codes, full = quantise_straight_through(features, SCHEDULE, CONFIG, [SCALES, 1, 2])
    for clip in SCHEDULE.clips:
        target = features[:, :, clip.frame_slice]
        bits, summed = encode_bits(target, clip, CONFIG.world_model)
        torch.testing.assert_close(full[:, :, clip.frame_slice], summed)
        for row, kept in enumerate((SCALES, 1, 2)):
            partial = torch.zeros_like(summed[:1])
            for step, step_bits in zip(clip.steps, bits, strict=True):
                if step.scale < kept:
                    partial = add_codes(partial, step_bits[row : row + 1])
            torch.testing.assert_close(codes[row : row + 1, :, clip.frame_slice], partial, atol=1e-5, rtol=1e-5)


def test_readouts_give_one_motion_per_frame():
    readouts = MotionReadouts(CONFIG, columns=4)
    rows, cols = CONFIG.schedule.latent_hw
    features = torch.randn(3, CONFIG.video_vae.feature_channels, 9, 8, 12)
    for motion, flow in (readouts.from_codes(_features()), readouts.from_features(features)):
        assert motion.shape == (3, 8, 4)
        assert flow.shape == (3, 8, 2, rows, cols)


def test_frames_span_minus_one_to_one():
    frames = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1, 1).expand(1, 2, 4, 5, 3)
    video = frames_to_video(frames)
    assert video.shape == (1, 3, 2, 4, 5)
    assert (float(video[:, :, 0].max()), float(video[:, :, 1].min())) == (-1.0, 1.0)


def test_training_lowers_the_reconstruction_error_and_repeats_itself(flights: FlightSet, tmp_path: Path):
    training = VaeTrainingConfig(
        encoder=OptimiserConfig(learning_rate=1e-3, steps=4, warmup_steps=2, log_every=2),
        optimiser=OptimiserConfig(learning_rate=4e-3, steps=60, warmup_steps=4, log_every=4),
        encoder_batch=3,
        batch=3,
        window=5,
    )

    def train(name: str) -> tuple[VideoVAE, list[dict]]:
        torch.manual_seed(0)
        vae = VideoVAE(CONFIG.video_vae)
        train_vae(vae, CONFIG, flights, training, tmp_path / name, seed=3)
        return vae, [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]

    vae, curve = train("one")
    assert [row["stage"] for row in curve[:3]] == ["vae_encoder", "vae_encoder", "vae"]
    assert curve[-1]["reconstruction"] < 0.7 * curve[2]["reconstruction"]
    assert not vae.training
    again, _ = train("two")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("change", [{"window": 17}, {"window": 4}, {"encoder_window": 2}, {"encoder_window": 1}])
def test_windows_that_do_not_fit_are_refused(flights: FlightSet, tmp_path: Path, change: dict):
    training = replace(VaeTrainingConfig(window=5), **change)
    with pytest.raises(ConfigError, match="frames"):
        train_vae(VideoVAE(CONFIG.video_vae), CONFIG, flights, training, tmp_path / "curve", seed=0)


def test_latents_do_not_depend_on_the_batch(flights: FlightSet):
    vae = random_model(CONFIG).vae
    one, many = encode_flights(vae, flights, batch=1), encode_flights(vae, flights, batch=4)
    assert one.shape == (6, 16, 7, 2, 3)
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)


def test_label_statistics_are_those_of_all_rows(flights: FlightSet):
    stats = replace(flights).label_stats()
    rows = flights.deltas.reshape(-1, 6)
    np.testing.assert_allclose(stats.mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.std[[0, 3, 4, 5]], rows.std(0)[[0, 3, 4, 5]], rtol=1e-5)
    np.testing.assert_allclose(stats.std[1:3], 1e-6)
