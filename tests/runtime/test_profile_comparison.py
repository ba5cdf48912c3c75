"""Profiles are compared with `exact` on the same frames and draws: what they save, and what they change."""

from pathlib import Path

import numpy as np
import pytest
from small_models import random_frames

from worldvln_edge.generation_profile import GenerationProfile
from worldvln_edge.runtime.bench.profile_comparison import (
    ObservedFlight,
    ProfileComparison,
    ProfileMeasurement,
    compare_profiles,
    flights_in_comparison,
)
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

FLIGHTS, SEGMENTS = 2, 6
OWN = {
    "coarse": GenerationProfile(name="coarse", skipped_scales=1),
    "unguided": GenerationProfile(name="unguided", guided_scales=0),
    "once": GenerationProfile(name="once", max_repetitions=1),
}


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1, profiles=OWN)


def observed(policy: WorldVLNPolicy, seed: int, frames: int = 9) -> ObservedFlight:
    return ObservedFlight(prompt="fly forward 5 m", frames=random_frames(policy.config, frames, seed=seed), seed=seed)


@pytest.fixture(scope="module")
def flown(policy) -> tuple[ProfileComparison, int]:
    ended = []
    comparison = compare_profiles(
        policy, [observed(policy, seed) for seed in range(FLIGHTS)], on_flight=lambda: ended.append(1)
    )
    return comparison, len(ended)


@pytest.fixture(scope="module")
def of(flown) -> dict[str, ProfileMeasurement]:
    return {measured.profile.name: measured for measured in flown[0].profiles}


def test_exact_agrees_with_itself_to_the_last_bit(of):
    exact = of["exact"]
    assert (exact.agreement.bits_equal, exact.agreement.bits_drawn) == (1.0, 1.0)
    assert exact.agreement.codes_difference == 0.0
    assert exact.agreement.translation_cm.p95 == exact.agreement.rotation_deg.p95 == 0.0
    assert [scale.equal for scale in exact.agreement.scales] == [1.0, 1.0, 1.0]
    assert exact.speed.segment_speed_up == exact.speed.world_model_speed_up == 1.0


def test_other_draws_change_what_exact_does(flown):
    other = flown[0].other_draws
    assert 0.3 < other.bits_equal < 1.0
    assert other.bits_drawn == 1.0
    assert other.codes_difference > 0.1
    assert other.translation_cm.p95 > other.translation_cm.p50 > 0.0


def test_skipped_scale_has_no_bits_and_shows_in_codes_and_actions(of):
    coarse = of["coarse"].agreement
    assert [scale.equal for scale in coarse.scales] == [1.0, 1.0, None]
    assert [scale.bits for scale in coarse.scales] == [
        SEGMENTS * 2 * tokens * repetitions * bits for tokens, repetitions, bits in ((1, 2, 6), (2, 2, 6), (6, 0, 16))
    ]
    drawn, left_out = 2 * (1 * 2 * 6 + 2 * 2 * 6), 2 * 6 * 16  # two latent frames a clip
    assert coarse.bits_drawn == pytest.approx(drawn / (drawn + left_out))
    assert coarse.bits_equal == 1.0  # what it leaves out comes behind everything it draws
    assert coarse.codes_difference > 0.05
    assert coarse.translation_cm.p95 > 0.0


def test_repetitions_are_compared_with_the_ones_they_are(of):
    once = of["once"].agreement
    assert once.scales[0].equal == 1.0  # the first step of a clip sees the same in both
    assert once.scales[0].bits == SEGMENTS * 2 * 6
    assert 0.0 < once.bits_drawn < 1.0


def test_work_is_counted_with_and_without_the_unconditional_row(of):
    exact, unguided = of["exact"].speed, of["unguided"].speed
    assert exact.row_steps == 2 * exact.token_steps
    assert unguided.token_steps == exact.token_steps
    assert unguided.row_steps == unguided.token_steps  # the text, of two rows, was encoded before
    assert of["coarse"].speed.token_steps < exact.token_steps
    assert of["fast"].speed.row_steps < of["balanced"].speed.row_steps < exact.row_steps


def test_every_segment_is_timed_and_the_world_model_is_a_part_of_it(of):
    for measured in of.values():
        speed = measured.speed
        assert speed.segment.runs == speed.world_model.runs == SEGMENTS
        assert 0.0 < speed.world_model.p50_ms < speed.segment.p50_ms


def test_number_of_flights_is_known_beforehand(policy, flown):
    assert flown[1] == flights_in_comparison(len(policy.profiles), FLIGHTS)


def test_comparison_is_the_same_again(policy, flown):
    again = compare_profiles(policy, [observed(policy, seed) for seed in range(FLIGHTS)])
    assert [each.agreement for each in again.profiles] == [each.agreement for each in flown[0].profiles]
    assert again.other_draws == flown[0].other_draws


def test_flights_that_cannot_be_compared_are_refused(policy):
    with pytest.raises(ValueError, match="no flights to compare profiles on"):
        compare_profiles(policy, [])
    with pytest.raises(ValueError, match="a flight needs 9 frames for all segments to start, found 8"):
        compare_profiles(policy, [observed(policy, 0, frames=8)])


def test_frames_are_not_changed(policy):
    flight = observed(policy, 3)
    before = [frame.copy() for frame in flight.frames]
    compare_profiles(policy, [flight])
    for frame, copy in zip(flight.frames, before, strict=True):
        np.testing.assert_array_equal(frame, copy)
