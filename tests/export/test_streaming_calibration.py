"""Block by block gives what the whole model gives, in the memory of one block."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from small_models import random_frames, save_random_checkpoint, tiny_config

from worldvln_edge.config import GenerationConfig, ModelConfig
from worldvln_edge.export import hidden_states
from worldvln_edge.export.activation_recorder import recording
from worldvln_edge.export.calibrate import Flight, collect
from worldvln_edge.export.calibration import ActivationStatistics, CalibrationError
from worldvln_edge.export.hidden_states import HiddenStates
from worldvln_edge.export.make_checkpoint import make_checkpoint
from worldvln_edge.export.teacher_forcing import forced_steps
from worldvln_edge.images import transform
from worldvln_edge.models.checkpoint_source import CheckpointSource, load_source, open_any
from worldvln_edge.models.generation import TextCondition, generate_clip
from worldvln_edge.models.quantizer import encode_bits
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule

CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "as served": tiny_config,
    "every earlier scale is seen": lambda: tiny_config(context_from_largest_no=0, repetitions=1),
    "no guidance": lambda: tiny_config(generation=GenerationConfig(cfg=1.0)),
    "two clips a segment": lambda: tiny_config(clips_per_segment=2),
}


def flights(config: ModelConfig) -> list[Flight]:
    texts = ("fly forward 5 m", "turn left to the red tower .")
    return [(np.stack(random_frames(config, config.horizon.num_frames, seed)), t) for seed, t in enumerate(texts)]


@torch.no_grad()
def whole_model(source: CheckpointSource, flown: list[Flight]) -> dict[str, ActivationStatistics]:
    """The generation loop with forced bits, every clip once: observed ones as context, the others whole."""
    checkpoint, config = load_source(source), source.config
    model, world = checkpoint.model, checkpoint.model.world_model
    tokenizer = PromptTokenizer.load(source.tokenizer_file, config.world_model.text_max_tokens)
    with recording(world, "world_model.") as recorders:
        for frames, instruction in flown:
            ids = tokenizer.encode(tagged_prompt(instruction, config.horizon))[None]
            text = TextCondition.build(
                world, model.text_encoder(torch.from_numpy(ids))[0], guided=config.generation.cfg != 1
            )
            video = torch.from_numpy(np.stack([transform(frame, config.image_hw) for frame in frames], 1))[None]
            latents = model.vae.raw_features(model.vae.encode(video)[0])
            schedule = ScaleSchedule(config.schedule, latents.shape[2])
            kv = text.key_values(world)
            for clip in schedule.clips:
                bits = encode_bits(latents[:, :, clip.frame_slice], clip, config.world_model)[0]
                forced = {step.real_scale_id: b for step, b in zip(clip.steps, bits, strict=True)}
                keep = schedule.scales_referred_to(clip.index)
                generate_clip(
                    world, schedule, clip.index, kv, config.generation, 0, forced, keep, record=clip.index > 0
                )
    return {key: recorder.statistics(key) for key, recorder in recorders.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_streaming_measures_what_the_whole_model_measures(tmp_path: Path, name: str):
    config = CONFIGS[name]()
    save_random_checkpoint(tmp_path / "checkpoint", config)
    source = open_any(tmp_path / "checkpoint")
    found = collect(source, flights(config), frames_from="test").inputs
    expected = whole_model(source, flights(config))
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert found[key].largest == pytest.approx(want.largest, rel=1e-4), key
        assert found[key].robust == pytest.approx(want.robust, rel=0.03), key
        for field in ("channel_largest", "mean_abs", "mean_square"):
            torch.testing.assert_close(getattr(found[key], field), getattr(want, field), rtol=1e-3, atol=1e-5)


def test_observed_clips_run_as_context_only():
    steps = forced_steps(tiny_config())
    first = [forced for forced in steps if forced.step.clip == 0]
    assert first
    assert all(forced.is_kept for forced in first)
    later = [forced for forced in steps if forced.step.clip == 1]
    assert len(later) == 2 + 2 + 1


def test_hidden_states_in_a_file_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config()
    save_random_checkpoint(tmp_path / "checkpoint", config)
    source = open_any(tmp_path / "checkpoint")
    expected = collect(source, flights(config), frames_from="test")
    monkeypatch.setattr(hidden_states, "_MEMORY_BYTES", 0)
    assert collect(source, flights(config), frames_from="test", folder=tmp_path).sha256 == expected.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_too_little_room_for_hidden_states_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hidden_states, "_MEMORY_BYTES", 0)
    monkeypatch.setattr(hidden_states.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5_000_000}))
    with pytest.raises(CalibrationError, match=r"0\.0 GB free, the hidden states of the flights need 0\.8 GB"):
        HiddenStates([(1, 200, 1_000_000)], tmp_path)


_MEASURE = """
import json, resource, sys
from pathlib import Path
import numpy as np
import torch
from worldvln_edge.export.calibrate import collect
from worldvln_edge.models.checkpoint_source import open_any
torch.set_num_threads(1)
source = open_any(Path(sys.argv[1]))
calibration = collect(source, [(np.load(sys.argv[2]), "fly forward")], frames_from="test", folder=Path(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "inputs": len(calibration.inputs)}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path):
    """Twenty blocks of 59 MB peak within two blocks of what two blocks peak at."""
    peaks = {}
    for depth in (2, 20):
        tiny = tiny_config()
        world = msgspec.structs.replace(
            tiny.world_model, width=1024, heads=8, kv_heads=2, intermediate=4096, depth=depth, block_chunks=2
        )
        config = msgspec.structs.replace(tiny, world_model=world)
        checkpoint = tmp_path / str(depth)
        made = make_checkpoint(config, checkpoint, seed=0)
        block_bytes = 4 * (2 * 1024**2 + 2 * 1024 * 256 + 3 * 1024 * 4096)
        assert made.part_bytes["backbone"] >= depth * block_bytes / 2  # bfloat16
        np.save(tmp_path / "frames.npy", np.stack(random_frames(config, config.horizon.num_frames)))
        command = [sys.executable, "-c", _MEASURE, str(checkpoint), str(tmp_path / "frames.npy")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["inputs"] == 4 * depth
        peaks[depth] = found["peak"]
    assert peaks[20] - peaks[2] < 2 * block_bytes
