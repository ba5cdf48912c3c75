"""RGB head training: it learns a motion that only a comparison of two frames shows."""

import json
from pathlib import Path

import numpy as np
import torch
from small_models import random_frames, tiny_config

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.models.action_decoder import RgbActionHead
from worldvln_edge.training.stages.flight_data import FlightSet
from worldvln_edge.training.stages.loop import OptimiserConfig
from worldvln_edge.training.stages.rgb_head import RgbTrainingConfig, train_rgb_head

CONFIG = tiny_config(clips_per_segment=2, left_context=3)
FRAMES, FLIGHTS = CONFIG.horizon.num_frames, 5
STATS = LabelStats(mean_angles=(0, 0, 0), std_angles=(1, 1, 1), mean_t=(0, 0, 0), std_t=(1, 1, 1))


def _flights() -> FlightSet:
    """Pictures whose brightness goes up or down with the yaw of the step."""
    rng = np.random.default_rng(0)
    base = np.stack([np.stack(random_frames(CONFIG, 1, seed=i)).repeat(FRAMES, 0) for i in range(FLIGHTS)]) // 4
    motion = rng.choice([-1.0, 1.0], (FLIGHTS, FRAMES - 1))
    level = np.concatenate([np.zeros((FLIGHTS, 1)), motion.cumsum(1)], 1) * 8 + 90
    deltas = np.zeros((FLIGHTS, FRAMES - 1, 6), np.float32)
    deltas[..., 0] = motion
    frames = np.clip(base + level[..., None, None, None], 0, 255).astype(np.uint8)
    return FlightSet(frames=frames, deltas=deltas, instructions=("turn left",) * FLIGHTS)


def _train(tmp_path: Path, *, flow_weight: float) -> tuple[RgbActionHead, list[dict]]:
    torch.manual_seed(0)
    head = RgbActionHead(CONFIG.action_decoder, time_embed_std=0.7)
    training = RgbTrainingConfig(
        optimiser=OptimiserConfig(learning_rate=4e-3, steps=150, warmup_steps=5, log_every=10),
        windows=24,
        flow_weight=flow_weight,
    )
    curve = tmp_path / "curve.jsonl"
    train_rgb_head(head, _flights(), STATS, training, curve, seed=0)
    return head, [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]


def test_rgb_head_learns_from_real_frames(tmp_path: Path):
    head, rows = _train(tmp_path, flow_weight=0.0)
    assert rows[-1]["motion"] < 0.8 * rows[0]["motion"]
    assert not head.training


def test_flow_readout_learns_and_leaves_no_trace_in_the_head(tmp_path: Path):
    head, rows = _train(tmp_path, flow_weight=1.0)
    assert rows[-1]["flow"] < rows[0]["flow"]
    assert head.state_dict().keys() == RgbActionHead(CONFIG.action_decoder).state_dict().keys()
