"""What VAE training adds: what is quantised, what is dropped, where the gradient goes."""

import torch
from small_models import tiny_config

from worldvln_edge.models.quantizer import add_codes, encode_bits
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.vae import MotionReadouts, frames_to_video, quantise_straight_through

CONFIG = tiny_config()
SCHEDULE = ScaleSchedule(CONFIG.schedule, 5)
SCALES = CONFIG.schedule.scales_per_clip


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
