"""Graphs that leave the main walk: predicted pixels and the RGB head, as in PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import random_frames

from worldvln_edge.bundle import Bundle
from worldvln_edge.images import rgb_head_input
from worldvln_edge.models.worldvln import WorldVLN, load_checkpoint
from worldvln_edge.runtime.engines.engine import Engine, OnnxEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder, FrameEncoder

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> WorldVLN:
    return load_checkpoint(tiny_checkpoint).model


@pytest.fixture(scope="module")
def engines(tiny_bundle: Path) -> dict[str, Engine]:
    bundle = Bundle.open(tiny_bundle)
    names = [name for name in bundle.manifest.graphs if name.startswith("vae_") or name == graphs.RGB_HEAD]
    return {name: OnnxEngine(bundle.graph_path(name), threads=1) for name in names}


def _codes(model: WorldVLN, latents: int) -> np.ndarray:
    shape = (model.config.video_vae.raw_channels, latents, *model.config.schedule.latent_hw)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_committed_and_predicted_pixels_equal_one_decode(model: WorldVLN, engines: dict[str, Engine]):
    codes = _codes(model, 5)
    decoder = FeatureDecoder(engines)
    pixels = []
    for part in (slice(0, 1), slice(1, 3)):
        features = decoder.commit(codes[:, part], fetch=True)
        pixels.append(decoder.commit_pixels(features, codes[:, part]))
    for _ in range(2):  # a prediction leaves no trace
        features = decoder.peek(codes[:, 3:], fetch=True)
        predicted = decoder.peek_pixels(features, codes[:, 3:])
    expected, _ = model.vae.decode(torch.from_numpy(codes)[None])
    np.testing.assert_allclose(np.concatenate([*pixels, predicted], 2), expected.numpy(), atol=TOLERANCE)
    assert expected.std() > 0.1


def test_streamed_features_equal_one_decode(model: WorldVLN, engines: dict[str, Engine]):
    codes = _codes(model, 6)
    decoder = FeatureDecoder(engines)
    parts = [decoder.commit(codes[:, part], fetch=True) for part in (slice(0, 1), slice(1, 2), slice(2, 6))]
    expected, _ = model.vae.decode_features(torch.from_numpy(codes)[None])
    np.testing.assert_allclose(np.concatenate(parts, 2), expected.numpy(), atol=TOLERANCE)
    assert decoder.latents_decoded == 6


@pytest.mark.parametrize("calls", [(9,), (1, 8), (1, 1, 1, 1, 1, 1, 1, 1, 1), (4, 5), (2, 0, 7)])
def test_streamed_latents_equal_one_encode(model: WorldVLN, engines: dict[str, Engine], calls: tuple[int, ...]):
    video = np.random.default_rng(1).uniform(-1, 1, (9, 3, *model.config.image_hw)).astype(np.float32)
    encoder = FrameEncoder(engines, model.config.video_vae.temporal_stride)
    latents, first = [], 0
    for count in calls:
        latents += encoder.push(list(video[first : first + count]))
        first += count
    h, _ = model.vae.encode(torch.from_numpy(video).transpose(0, 1)[None])
    expected = model.vae.raw_features(h)[0].numpy()
    np.testing.assert_allclose(np.stack(latents, 1), expected, atol=TOLERANCE)
    assert encoder.frames_encoded == 9


@pytest.mark.parametrize("frames", [5, 9, 13])
def test_rgb_head_graph_equals_pytorch(model: WorldVLN, engines: dict[str, Engine], frames: int):
    decoder = model.config.action_decoder
    pictures = random_frames(model.config, frames, hw=(31, 40))
    images = rgb_head_input(pictures, decoder.rgb_head.image_hw, decoder.rgb_mean, decoder.rgb_std)
    logits = engines[graphs.RGB_HEAD].run({"images": images})["logits"]
    np.testing.assert_allclose(logits, model.rgb_head(torch.from_numpy(images)).numpy(), atol=TOLERANCE)
    assert logits.shape == (frames - decoder.rgb_head.window + 1, decoder.rgb_head.outputs)
