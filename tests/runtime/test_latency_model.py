"""Deadlines choose the deepest profile that fits, from times that were measured for this very bundle and device."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import random_frames

from worldvln_edge.bundle import Bundle
from worldvln_edge.cli import main
from worldvln_edge.client import SessionClient
from worldvln_edge.generation_profile import GenerationProfile
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.worldvln.latency_model import (
    DeadlineChooser,
    LatencyModelError,
    ProfileLatency,
    device_name,
    new_model,
    read_model,
    write_model,
)
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

EXACT = GenerationProfile(name="exact")
MIDDLE = GenerationProfile(name="balanced", max_repetitions=1)
QUICK = GenerationProfile(name="fast", guided_scales=0)


@pytest.fixture
def manifest(tiny_bundle: Path):
    return Bundle.open_manifest(tiny_bundle)


def chooser(manifest, *, seconds=(0.4, 0.2, 0.1)) -> DeadlineChooser:
    profiles = (EXACT, MIDDLE, QUICK)
    measured = tuple(
        ProfileLatency(profile=profile, segment_s=(s, 2 * s)) for profile, s in zip(profiles, seconds, strict=True)
    )
    return DeadlineChooser(new_model(manifest, "board", 1, measured), {profile.name: profile for profile in profiles})


@pytest.mark.parametrize(
    ("budget_s", "segment", "chosen"),
    [(1.0, 0, "exact"), (0.41, 0, "balanced"), (0.3, 0, "balanced"), (0.12, 0, "fast"), (0.3, 1, "fast")],
)
def test_deepest_profile_that_fits_is_chosen(manifest, budget_s: float, segment: int, chosen: str):
    choice = chooser(manifest).choose(EXACT, segment, budget_s)
    assert choice.profile.name == chosen
    assert f"of the {budget_s * 1e3:.0f} ms that are left" in choice.reason


def test_quickest_profile_is_flown_when_nothing_fits(manifest):
    choice = chooser(manifest).choose(EXACT, 0, 0.05)
    assert choice.profile == QUICK
    assert choice.reason == "nothing fits the 50 ms that are left; about 100 ms is the least"


def test_nothing_deeper_than_the_ceiling_is_chosen(manifest):
    assert chooser(manifest).choose(MIDDLE, 0, 10.0).profile == MIDDLE
    assert chooser(manifest).least_seconds(MIDDLE, 0) == pytest.approx(0.1)
    assert chooser(manifest).least_seconds(QUICK, 5) == pytest.approx(0.2)


def test_board_that_throttles_gets_less(manifest):
    slow = chooser(manifest)
    assert slow.choose(EXACT, 0, 0.5).profile == EXACT
    for _ in range(8):
        slow.add(EXACT, 0, 0.8)
    assert slow.correction == pytest.approx(2.0)
    assert slow.choose(EXACT, 0, 0.5).profile == MIDDLE


def test_profile_that_was_changed_since_is_not_chosen_by_old_times(manifest):
    old = chooser(manifest)
    changed = DeadlineChooser(old._model, {"exact": EXACT, "fast": GenerationProfile(name="fast", skipped_scales=1)})
    assert changed.choose(EXACT, 0, 0.01).profile == EXACT


def test_without_times_of_the_ceiling_nothing_is_replaced(manifest):
    mine = GenerationProfile(name="mine", skipped_scales=1)
    choice = chooser(manifest).choose(mine, 0, 0.01)
    assert (choice.profile, choice.reason) == (mine, "mine was not measured here; run worldvln-edge tune")


def test_times_are_kept_with_the_bundle_by_device_and_threads(tmp_path, manifest):
    model = new_model(manifest, "Board X (rev 2)", 2, (ProfileLatency(profile=EXACT, segment_s=(0.1,)),))
    path = write_model(tmp_path, model)
    assert path == tmp_path / "tuned" / "board-x-rev-2-2-threads.json"
    assert read_model(tmp_path, manifest, "Board X (rev 2)", 2) == model
    assert read_model(tmp_path, manifest, "Board X (rev 2)", 4) is None
    assert read_model(tmp_path, manifest, "Board Y", 2) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 9', "schema 9 found, this version reads 1"),
        ('"graphs_sha256": "', '"graphs_sha256": "0', "measured on another export"),
        ("{", "", "not a file of measured times"),
    ],
)
def test_times_that_do_not_belong_here_are_refused(tmp_path, manifest, old: str, new: str, message: str):
    path = write_model(tmp_path, new_model(manifest, "b", 1, (ProfileLatency(profile=EXACT, segment_s=(0.1,)),)))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(LatencyModelError, match=message) as error:
        read_model(tmp_path, manifest, "b", 1)
    assert f"run `worldvln-edge tune {tmp_path}` again" in str(error.value)


def test_tuned_bundle_lets_a_deadline_choose_and_the_answer_says_why(tiny_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    result = CliRunner().invoke(main, ["tune", str(folder), "--threads", "1", "--flights", "1"])
    assert result.exit_code == 0, result.output
    assert "balanced" in result.output
    policy = load_policy(folder, threads=1)
    model = read_model(folder, policy.manifest, device_name(), 1)
    assert {entry.profile.name for entry in model.profiles} == {"exact", "balanced", "fast"}
    assert all(len(entry.segment_s) == 3 and min(entry.segment_s) > 0 for entry in model.profiles)
    frames = random_frames(policy.config, 9, seed=7)
    with BackgroundServer(policy) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start("fly forward 5 m", seed=1)
        generous = client.observe(frames[:1], deadline_ms=60_000)
        without = client.observe(frames[1:5])
    assert generous.profile == "exact"
    assert "of the" in generous.why
    assert without.profile == "exact"
    assert without.why is None


def test_late_segment_is_flown_with_the_quickest_profile(tiny_bundle):
    plain = load_policy(tiny_bundle, threads=1)
    measured = tuple(
        ProfileLatency(profile=profile, segment_s=(seconds,))
        for profile, seconds in zip(plain.profiles.values(), (9.0, 6.0, 3.0), strict=True)
    )
    policy = WorldVLNPolicy(
        plain.manifest, plain.engines, plain.tokenizer, latency=new_model(plain.manifest, "b", 1, measured)
    )
    session = policy.new_session("fly forward 5 m", seed=1)
    assert session.least_s() == pytest.approx(3.0)
    chunk = session.observe(random_frames(policy.config, 1, seed=7), budget_s=4.0)
    assert chunk.profile == "fast"
    assert np.isfinite(chunk.actions).all()
