"""Two policies of one model on different devices: equal flights, up to the first bit that rounding decided."""

import numpy as np
from small_models import random_frames

from worldvln_edge.noise import step_uniforms
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, WorldVLNSession

PROMPT = "fly forward 5 m"


def agreeing_segments(
    policy: WorldVLNPolicy, other: WorldVLNPolicy, *, seed: int, border: float, tolerance: float
) -> int:
    """Fly both; fail where they differ by more than rounding (spec/world_model.md 6).

    Args:
        policy, other: of the same checkpoint.
        seed: of the frames and the draws.
        border: largest |u - p| at which rounding may decide a drawn bit; everything after such a bit may differ.
        tolerance: of actions whose bits are all equal, cm and deg.

    Returns:
        Segments in front of the first bit that differs.
    """
    points = policy.config.horizon.points
    frames = random_frames(policy.config, points[-2], seed=seed)
    sessions = [each.new_session(PROMPT, seed=seed, record=True) for each in (policy, other)]
    for segment, point in enumerate(points[:-1]):
        sent = points[segment - 1] if segment else 0
        ours, theirs = (session.observe(frames[sent:point]) for session in sessions)
        assert ours is not None
        assert theirs is not None
        if _observed_bits_differ(*sessions) or _drawn_bits_differ(policy, *sessions, seed=seed, border=border):
            return segment
        np.testing.assert_allclose(theirs.actions, ours.actions, atol=tolerance)
    return len(points) - 1


def _observed_bits_differ(ours: WorldVLNSession, theirs: WorldVLNSession) -> bool:
    """A latent whose sign rounding decided; that is rare."""
    pairs = zip(ours.observed_clips, theirs.observed_clips, strict=True)
    bits = [np.concatenate([a != b for a, b in zip(x.bits, y.bits, strict=True)], None) for x, y in pairs]
    differing = np.concatenate(bits)
    assert differing.mean() < 0.01
    return bool(differing.any())


def _drawn_bits_differ(
    policy: WorldVLNPolicy, ours: WorldVLNSession, theirs: WorldVLNSession, *, seed: int, border: float
) -> bool:
    for index, (one, two) in enumerate(zip(ours.last_prediction, theirs.last_prediction, strict=True)):
        clip = policy.tables.schedule.clips[len(ours.observed_clips) + index]
        for step, bits, others, probabilities in zip(clip.steps, one.bits, two.bits, one.probabilities, strict=True):
            differing = bits != others
            if differing.any():
                uniforms = step_uniforms(seed, clip.index, step.step_in_clip, step.thw, bits.shape[-1])
                assert np.abs(uniforms - probabilities)[differing].max() < border
                return True
    return False
