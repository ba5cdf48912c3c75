"""The exact schedule against the research server's over many seeds: equal actions, and where draws differ, rounding.

Source: spec/world_model.md 6, 9.
"""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from golden_world_model import GoldenSet
from small_models import random_frames, random_model, tiny_config
from torch_engines import torch_engines

from worldvln_edge.bundle import TOKENIZER_FILE, Bundle
from worldvln_edge.config import HorizonConfig, VideoVAEConfig
from worldvln_edge.export.exporter import export_bundle
from worldvln_edge.export.graph_sources import guidance_rows, kv_capacity
from worldvln_edge.models.checkpoint_source import open_any
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.presets import preset
from worldvln_edge.runtime.bench.bench_comparison import TOLERANCE
from worldvln_edge.runtime.bench.full_horizon import FullHorizonFlight
from worldvln_edge.runtime.bench.schedule_agreement import compare_segments
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

PROMPT = "fly forward 5 m"


def check_forced_bits(policy: WorldVLNPolicy, frames: list[np.ndarray], seeds: range) -> None:
    """Fly every seed; the research server's schedule is given the bits that ours drew."""
    for seed in seeds:
        session = policy.new_session(PROMPT, seed=seed, record=True)
        flight, sent = FullHorizonFlight(policy, PROMPT, seed=seed), 0
        for segment, point in enumerate(policy.info.horizon.points[:-1]):
            ours = session.observe(frames[sent:point])
            clips = zip(policy.clips_of(segment), session.last_prediction, strict=True)
            theirs = flight.observe(frames[sent:point], forced_bits={index: clip.bits for index, clip in clips})
            np.testing.assert_allclose(ours.actions, theirs.actions, rtol=0, atol=TOLERANCE, err_msg=f"{seed=}")
            session.work_ahead()
            sent = point
        session.close()


def check_free_draws(policy: WorldVLNPolicy, frames: list[np.ndarray], seeds: range) -> None:
    """Both draw for themselves: the first bits that differ, if any, were drawn on the border."""
    for seed in seeds:
        for found in compare_segments(policy, frames, PROMPT, seed):
            assert found.is_rounding(TOLERANCE), f"{seed=}: {found}"


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


def test_tiny_model_with_forced_bits(tiny):
    check_forced_bits(tiny, random_frames(tiny.config, 9, seed=2), range(20))


def test_tiny_model_with_free_draws(tiny):
    check_free_draws(tiny, random_frames(tiny.config, 9, seed=2), range(20))


def in_pytorch(model: WorldVLN, bundle: Path) -> WorldVLNPolicy:
    """A policy that flies a model without an export, with everything else of a bundle."""
    other, config = Bundle.open(bundle), model.config
    manifest = msgspec.structs.replace(
        other.manifest, model=config, kv_capacity=kv_capacity(config), guidance_rows=guidance_rows(config)
    )
    tokenizer = PromptTokenizer.load(other.file_path(TOKENIZER_FILE), config.world_model.text_max_tokens)
    return WorldVLNPolicy(manifest, torch_engines(model), tokenizer)


@pytest.mark.parametrize("context", [(1, 2), (0, 1)], ids=["released rule", "all scales"])
def test_segments_of_two_clips(tiny_bundle, context: tuple[int, int]):
    largest, interval = context
    config = tiny_config(clips_per_segment=2, context_from_largest_no=largest, context_interval=interval)
    policy = in_pytorch(random_model(config), tiny_bundle)
    frames = random_frames(config, config.horizon.points[-2], seed=2)
    check_forced_bits(policy, frames, range(3))
    check_free_draws(policy, frames, range(3))


@pytest.mark.golden
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(20), marks=pytest.mark.slow)], ids=["one", "twenty"])
def test_golden_world_model(golden, tiny_bundle, seeds: range):
    """Schedule, sizes and weights of the golden set; the other networks are random."""
    reference, tiny = GoldenSet(golden("world_model")), tiny_config()
    frames_per_segment = reference.schedule.frames_inner_clip * 4
    h, w = reference.schedule.latent_hw
    config = msgspec.structs.replace(
        tiny,
        name="golden",
        image_hw=(4 * h, 4 * w),
        schedule=reference.schedule,
        world_model=reference.model_config,
        text_encoder=msgspec.structs.replace(tiny.text_encoder, width=reference.model_config.text_channels),
        video_vae=VideoVAEConfig(
            block_out_channels=(8, 8, 8, 8),
            spatial_factors=(2, 1),
            temporal_factors=(2, 2),
            layers_per_block=1,
            latent_channels=reference.model_config.latent_channels // 4,
        ),
        generation=preset("worldvln-8b").generation,
        horizon=HorizonConfig(num_frames=1 + 3 * frames_per_segment, step=frames_per_segment),
    )
    model = random_model(config)
    model.world_model.load_state_dict(reference.model.state_dict())
    policy = in_pytorch(model, tiny_bundle)
    frames = random_frames(config, config.horizon.points[-2], seed=2)
    check_forced_bits(policy, frames, seeds)
    check_free_draws(policy, frames, seeds)


@pytest.mark.slow
def test_shipped_model(tmp_path_factory, tracer):
    bundle = tmp_path_factory.mktemp("shipped") / "bundle"
    packaged = Path(__file__).parents[2] / "worldvln_edge" / "checkpoints" / "nano"
    export_bundle(open_any(packaged), bundle, tracer=tracer)
    policy = load_policy(bundle)
    frames = random_frames(policy.config, 33, seed=2)
    check_forced_bits(policy, frames, range(20))
    check_free_draws(policy, frames, range(20))
