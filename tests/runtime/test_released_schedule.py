"""The released scales, repetitions and horizon: exactly the work of the minimal schedule, and the same actions."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from small_models import random_frames, released_schedule_config, save_random_checkpoint

from worldvln_edge.export.exporter import export_bundle
from worldvln_edge.models.checkpoint_source import open_any
from worldvln_edge.runtime.bench.full_horizon import FullHorizonFlight
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

PROMPT = "fly forward 5 m"
MINIMAL = (31_552, 36_928, 38_800)  # token-steps of a guidance row, without the text (spec/world_model.md 9.3)
CALLS = (41, 41, 42)
FULL_HORIZON, FULL_HORIZON_CALLS = 101_568, 160
MOTION_TOLERANCE = 1e-3  # cm and deg


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tracer) -> WorldVLNPolicy:
    root = tmp_path_factory.mktemp("released-schedule")
    save_random_checkpoint(root / "checkpoint", released_schedule_config())
    export_bundle(open_any(root / "checkpoint"), root / "bundle", tracer=tracer)
    return load_policy(root / "bundle", threads=1)


@pytest.fixture(scope="module")
def frames(policy: WorldVLNPolicy) -> list[np.ndarray]:
    return random_frames(policy.config, 33, seed=3)


def fly(session, frames: list[np.ndarray], after_segment: Callable[[], None] = lambda: None) -> list:
    chunks, sent = [], 0
    for point in (1, 17, 33):
        chunks.append(session.observe(frames[sent:point]))
        sent = point
        after_segment()
    return chunks


@pytest.fixture(scope="module")
def minimal(policy: WorldVLNPolicy, frames) -> tuple[np.ndarray, list[dict[str, int]]]:
    """Actions of a flight that never works ahead, and its counters before and after every segment."""
    session = policy.new_session(PROMPT, seed=5)
    counters = [session.counters]
    chunks = fly(session, frames, lambda: counters.append(session.counters))
    return np.concatenate([chunk.actions for chunk in chunks]), counters


def differences(counters: list[dict[str, int]], name: str) -> list[int]:
    return [after[name] - before[name] for before, after in itertools.pairwise(counters)]


def test_token_steps_and_calls_of_every_segment_are_those_of_the_minimal_schedule(policy, minimal):
    _, counters = minimal
    text = policy.encode_text(PROMPT, "").shape[1]
    assert differences(counters, "token_steps") == [MINIMAL[0] + text, *MINIMAL[1:]]
    assert differences(counters, "world_model_calls") == list(CALLS)
    assert counters[-1]["frames_encoded"] == 33
    assert counters[-1]["latents_decoded"] == 9 + 3 * 4


def test_work_done_ahead_is_the_same_work_for_the_same_actions(policy, frames, minimal):
    session = policy.new_session(PROMPT, seed=5)
    counters, held = [session.counters], []

    def after_segment() -> None:
        counters.append(session.counters)
        session.work_ahead()
        held.append(set(session.stored_scales))

    chunks = fly(session, frames, after_segment)
    np.testing.assert_array_equal(np.concatenate([chunk.actions for chunk in chunks]), minimal[0])
    # The text is remembered from the flight before.
    assert differences(counters, "token_steps") == list(MINIMAL)
    assert differences(counters, "world_model_calls") == [CALLS[0] - 1, *CALLS[1:]]
    # What the next clip refers to, as far as it was observed, and what the newest observed scale refers to.
    assert held == [{(0, 13), (0, 11)}, {(1, 13), (0, 11), (1, 11), (0, 9)}, set()]


@pytest.mark.slow
def test_full_horizon_schedule_gives_the_same_actions_for_three_times_the_work(policy, frames, minimal):
    flight = FullHorizonFlight(policy, PROMPT, seed=5)
    actions = np.concatenate([chunk.actions for chunk in fly(flight, frames)])
    np.testing.assert_allclose(minimal[0], actions, atol=MOTION_TOLERANCE)
    text = policy.encode_text(PROMPT, "").shape[1]
    assert flight.token_steps == 3 * (FULL_HORIZON + text)
    assert flight.calls == 3 * FULL_HORIZON_CALLS
