"""A profile may run the world model's steps in another precision, from another export of the same checkpoint."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from small_models import random_frames

from worldvln_edge.bundle import MANIFEST_FILE, Bundle
from worldvln_edge.config import ConfigError
from worldvln_edge.generation_profile import GenerationProfile, read_profiles
from worldvln_edge.runtime.bench.bench_flight import BenchConfig, fly_segments
from worldvln_edge.runtime.engines.engine import OnnxEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

PROMPT = "fly forward 5 m"
LIGHT = {"light": GenerationProfile(name="light", precision="int8")}


def relabelled(bundle: Path, folder: Path, **changes) -> Path:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle, folder)
    manifest = msgspec.structs.replace(Bundle.open(bundle).manifest, **changes)
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    return folder


@pytest.fixture(scope="module")
def other(tiny_bundle: Path, tmp_path_factory) -> Path:
    """As good as another precision: the same graphs under another label, and calls that can be told apart."""
    return relabelled(tiny_bundle, tmp_path_factory.mktemp("other") / "int8", precision="int8")


class Counted:
    def __init__(self, engine):
        self._engine, self.calls = engine, 0

    def run(self, *args, **options):
        self.calls += 1
        return self._engine.run(*args, **options)


def test_steps_of_the_profile_run_on_the_other_engine_and_nothing_else_does(tiny_bundle, other):
    loaded = load_policy(tiny_bundle, threads=1, profiles=LIGHT, also=[other])
    assert isinstance(loaded.step_engines["int8"], OnnxEngine)
    light, base = Counted(loaded.step_engines["int8"]), Counted(loaded.engines[graphs.WORLD_MODEL_STEP])
    engines = {**loaded.engines, graphs.WORLD_MODEL_STEP: base}
    policy = WorldVLNPolicy(loaded.manifest, engines, loaded.tokenizer, profiles=LIGHT, step_engines={"int8": light})
    frames = random_frames(policy.config, 1, seed=7)
    exact = policy.new_session(PROMPT, seed=1).observe(frames)
    assert (base.calls > 0, light.calls) == (True, 0)
    steps, base.calls = base.calls, 0
    session = policy.new_session(PROMPT, seed=1)
    session.profile = policy.profiles["light"]
    chunk = session.observe(frames)
    assert (base.calls, light.calls) == (0, steps)
    assert chunk.profile == "light"
    np.testing.assert_array_equal(chunk.actions, exact.actions)  # the same weights, under another label


def test_bench_counts_steps_of_the_other_engine(tiny_bundle, other):
    policy = load_policy(tiny_bundle, threads=1, profiles=LIGHT, profile="light", also=[other])
    timing = next(fly_segments(policy, BenchConfig(segments=1, warm_up_segments=0, frame_hw=(24, 32), threads=1)))
    assert len(timing.readings.steps) == len(policy.tables.schedule.clips[1].steps)


def test_profile_file_names_a_precision(tmp_path):
    file = tmp_path / "own.json"
    file.write_text('[{"name": "light", "precision": "int8"}]')
    assert read_profiles(file) == LIGHT
    assert not LIGHT["light"].is_exact


def test_own_precision_may_be_named(tiny_bundle):
    profiles = {"same": GenerationProfile(name="same", precision="fp32")}
    policy = load_policy(tiny_bundle, threads=1, profiles=profiles, profile="same")
    assert policy.new_session(PROMPT).observe(random_frames(policy.config, 1, seed=7)).profile == "same"


def test_precision_that_is_not_loaded_is_refused(tiny_bundle):
    with pytest.raises(ConfigError, match=r"no int8 weights are loaded, only fp32; export .* in int8.*--also"):
        load_policy(tiny_bundle, threads=1, profiles=LIGHT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32"}, "both are fp32"),
        ({"precision": "int8", "checkpoint_sha256": "0" * 64}, "another checkpoint"),
        ({"precision": "int8", "kv_flavour": "portable"}, "with a portable cache, the other in fp32 with a inplace"),
    ],
)
def test_bundle_that_does_not_go_with_it_is_refused(tiny_bundle, tmp_path, changes, message):
    folder = relabelled(tiny_bundle, tmp_path / "b", **changes)
    with pytest.raises(ConfigError, match=message):
        load_policy(tiny_bundle, threads=1, also=[folder])
