"""Action head training: which frames of a window are real, which predicted, and which labels belong to them."""

import itertools
import json

import msgspec
import numpy as np
import pytest
import torch
from small_models import STATS, WORDS, random_model, tiny_config
from torch import Tensor, nn

from worldvln_edge.action_windows import context_frame
from worldvln_edge.config import GenerationConfig
from worldvln_edge.models.action_decoder import LatentActionHead
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.action import (
    ActionTrainingConfig,
    FeatureCache,
    MotionWeights,
    cache_features,
    motion_loss,
    normalised_deltas,
    observed_codes,
    train_latent_head,
)
from worldvln_edge.training.stages.backbone import TextBatch
from worldvln_edge.training.stages.flight_data import FlightSet
from worldvln_edge.training.stages.loop import OptimiserConfig
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer

CONFIG = tiny_config(clips_per_segment=2, left_context=3)
FRAMES, STEP = CONFIG.horizon.num_frames, CONFIG.horizon.step
FLIGHTS = 5


def _flights(frames: np.ndarray | None = None) -> FlightSet:
    rng = np.random.default_rng(0)
    return FlightSet(
        frames=np.zeros((FLIGHTS, FRAMES, 2, 2, 3), np.uint8) if frames is None else frames,
        deltas=rng.normal(size=(FLIGHTS, FRAMES - 1, 6)).astype(np.float32),
        instructions=("fly forward 5 m .", "turn left", "climb", "fly back", "turn right")[:FLIGHTS],
    )


class _MarkedTimesFormer(nn.Module):
    """Reads flight and frame back from marked features and says the true label of every motion."""

    def __init__(self, labels: Tensor):
        super().__init__()
        self.labels = labels
        self.parameter = nn.Parameter(torch.zeros(1))
        self.windows: list[Tensor] = []

    def forward(self, marks_MWND: Tensor) -> Tensor:
        marks = marks_MWND[:, :, 0]  # [M, W, (flight, frame, is_predicted)]
        self.windows.append(marks)
        flight, frame = marks[..., 0].long(), marks[..., 1].long()
        return self.labels[flight[:, :-1], frame[:, :-1]].flatten(1) + self.parameter


class _MarkedHead(LatentActionHead):
    def __init__(self, labels: Tensor):
        super().__init__(CONFIG.action_decoder, CONFIG.video_vae.feature_channels)
        self.tsformer = _MarkedTimesFormer(labels)

    def tokens(self, features_BCTHW: Tensor) -> Tensor:
        return features_BCTHW.transpose(1, 2).flatten(0, 1)[:, :3, 0, 0][:, None]


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> tuple[Tensor, list[dict]]:
    """Windows seen in training, [M, W, (flight, 0-based frame, is_predicted)], and the loss curve."""
    marks = torch.zeros(FLIGHTS, CONFIG.video_vae.feature_channels, FRAMES, 1, 1)
    marks[:, 0] = torch.arange(FLIGHTS)[:, None, None, None]
    marks[:, 1] = torch.arange(FRAMES)[:, None, None]
    predicted = marks[:, :, 1:].clone()  # frames 2..num_frames, as cache_features gives them
    predicted[:, 2] = 1
    flights = _flights()
    head = _MarkedHead(normalised_deltas(flights, STATS.latent_head))
    curve = tmp_path_factory.mktemp("action") / "curve.jsonl"
    training = ActionTrainingConfig(
        optimiser=OptimiserConfig(learning_rate=0.0, steps=40, log_every=10), windows=32, predicted_share=0.6
    )
    cache = FeatureCache(true_NCFhw=marks, predicted_NCFhw=predicted)
    train_latent_head(head, CONFIG, flights, cache, STATS.latent_head, training, curve, seed=0)
    rows = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    return torch.cat(head.tsformer.windows), rows


def test_labels_are_those_of_the_frames_in_the_window(marked):
    _, curve = marked
    assert max(row["loss"] for row in curve) < 1e-9


def test_a_window_is_consecutive_frames_of_one_flight(marked):
    windows, _ = marked
    assert (windows[..., 0] == windows[:, :1, 0]).all()
    assert (windows[:, 1:, 1] - windows[:, :-1, 1] == 1).all()
    assert set(windows[..., 0].flatten().tolist()) == set(range(FLIGHTS))
    assert set(windows[..., 1].flatten().tolist()) == set(range(FRAMES))


def test_predicted_frames_stand_behind_real_ones_of_the_same_segment(marked):
    """Every mixed window is one that a segment of a flight really looks at."""
    windows, _ = marked
    window = CONFIG.action_decoder.latent_head.window
    points = CONFIG.horizon.points
    allowed = set()
    for observed, following in itertools.pairwise(points):  # 1-based
        for first in range(context_frame(observed, 3), following - window + 2):
            frames = range(first, first + window)
            allowed.add(tuple((f - 1, float(f > observed)) for f in frames))
    seen = {tuple((int(f), float(p)) for _, f, p in w.tolist()) for w in windows if w[:, 2].any()}
    assert seen <= allowed
    assert {w for w in allowed if any(p for _, p in w)} == seen  # and every one of them occurs


def test_all_true_windows_occur(marked):
    windows, _ = marked
    starts = {int(w[0, 1]) for w in windows if not w[:, 2].any()}
    assert starts == set(range(FRAMES - CONFIG.action_decoder.latent_head.window + 1))


def test_cached_features_are_what_a_flight_decodes():
    """Frame f of the cache, true or predicted, is frame f of the serving decode (clip 1: nothing is drawn)."""
    certain = GenerationConfig(cfg=1.0, tau_image=1e-4, tau_video=1e-4)
    config = msgspec.structs.replace(CONFIG, generation=certain)
    model = random_model(config)
    latents = torch.randn(3, 16, 1 + (FRAMES - 1) // 2, 2, 3, generator=torch.Generator().manual_seed(0))
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS, "<<<t=6s>>>", 32), 12)
    text = TextBatch(("fly forward 5 m .", "turn left", "climb"), tokenizer, config)
    cache = cache_features(model.vae, model.world_model, model.text_encoder, config, latents, text, seed=0, batch=2)
    schedule = ScaleSchedule(config.schedule, latents.shape[2])
    codes = observed_codes(latents, schedule, config)
    whole, _ = model.vae.decode_features(codes)
    assert cache.true_NCFhw.shape[2] == FRAMES
    assert cache.predicted_NCFhw.shape[2] == FRAMES - 1
    torch.testing.assert_close(cache.true_NCFhw.float(), whole, atol=2e-2, rtol=2e-3)  # stored as half
    # A true clip in the place of the predicted one would decode to the true features: same frames, other values.
    difference = (cache.predicted_NCFhw.float() - whole[:, :, 1:]).abs().flatten(3).amax(-1)
    assert (difference.amax(1) > 1e-2).all()
    # Predicted frames of a clip continue the true ones before it: decoding what predict_clip gave in a stream agrees.
    first_clip = slice(0, 2 * schedule.clips[1].frames)
    _, state = model.vae.decode_features(codes[:, :, :1])
    again, _ = model.vae.decode_features(codes[:, :, schedule.clips[1].frame_slice], state)
    torch.testing.assert_close(again, whole[:, :, 1 : 1 + first_clip.stop], atol=1e-4, rtol=1e-3)


def test_motion_loss_weighs_its_columns():
    predicted, target = torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)
    target[..., 0], target[..., 3], target[..., 5] = 3.0, 2.0, 1.0
    weights = MotionWeights(rotation=0.25, xy=1.0, z=2.0)
    assert float(motion_loss(predicted, target, weights)) == pytest.approx(0.25 * 3.0 + 2.0 + 2.0)


def test_normalised_labels_have_mean_zero_and_deviation_one():
    flights = _flights()
    rows = normalised_deltas(flights, flights.label_stats()).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
