"""VideoVAE against the reference arrays. Every size is read from the set's config.json and from the arrays."""

import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from worldvln_edge.config import VideoVAEConfig
from worldvln_edge.images import transform
from worldvln_edge.models.video_vae import VideoVAE, decoder_state_shapes, encoder_state_shapes
from worldvln_edge.presets import preset

pytestmark = pytest.mark.golden
TOLERANCE = 1e-4
STREAM_TOLERANCE = 1e-5
MAX_SPLITS = 16


def vae_config(config: dict) -> VideoVAEConfig:
    """The narrow model of the set: samplers without a temporal factor come last, as in the released model."""
    spatial, temporal = config["spatial_compression"], config["temporal_compression"]
    return VideoVAEConfig(
        block_out_channels=tuple(config["block_out_channels"]),
        spatial_factors=tuple(spatial),
        temporal_factors=tuple(temporal + [1] * (len(spatial) - len(temporal))),
        layers_per_block=config["layers_per_block"],
        latent_channels=config["latent_channels"],
    )


@pytest.fixture(scope="module")
def case(golden):
    folder = golden("video_vae")
    tensors = load_file(folder / "vae_tiny.safetensors")
    vae = VideoVAE(vae_config(json.loads((folder / "config.json").read_text())))
    weights = {key: tensor.float() for key, tensor in tensors.items() if tensor.is_floating_point()}
    vae.load_state_dict(weights, strict=True)
    with np.load(folder / "vae_tiny_io.npz") as arrays:
        arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    lengths = sorted(int(key.removeprefix("enc_h_")) for key in arrays if key.startswith("enc_h_"))
    assert lengths
    return SimpleNamespace(vae=vae.eval().requires_grad_(False), arrays=arrays, lengths=lengths)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    relative = 2.0**-10 if expected.dtype == torch.float16 else 0.0  # half-precision storage of the expected array
    torch.testing.assert_close(found, expected.float(), atol=tolerance, rtol=relative)


def splits(total: int, first_unit: int, unit: int) -> list[list[int]]:
    """Ways to cut `total` frames: a first part of first_unit + k*unit and later parts of k*unit."""
    marks = range(first_unit, total, unit)
    ways = [list(cut) for count in range(1, len(marks) + 1) for cut in combinations(marks, count)]
    step = max(1, -(-len(ways) // MAX_SPLITS))
    return [np.diff([0, *cut, total]).tolist() for cut in ways[::step]]


def test_encoder_and_raw_features_match_the_reference(case):
    for length in case.lengths:
        h, state = case.vae.encode(case.arrays["video"][:, :, :length].float())
        assert_close(h, case.arrays[f"enc_h_{length}"])
        assert_close(case.vae.raw_features(h), case.arrays[f"z_mean_{length}"])
        noise = case.arrays["eps"][:, :, : h.shape[2]].float()
        assert_close(case.vae.raw_features(h, noise), case.arrays[f"z_sample_{length}"])
        hw = tuple(case.arrays["video"].shape[-2:])
        assert [tuple(s.shape) for s in state] == encoder_state_shapes(case.vae.config, 1, hw)


def test_decoder_and_last_feature_match_the_reference(case):
    for length in case.lengths:
        codes = case.arrays[f"summed_codes_{length}"]
        feature, _ = case.vae.decode_features(codes)
        assert_close(feature, case.arrays[f"up_last_{length}"])
        pixels, state = case.vae.decode(codes)
        assert_close(pixels, case.arrays[f"decode_{length}"])
        hw = tuple(case.arrays["video"].shape[-2:])
        assert [tuple(s.shape) for s in state] == decoder_state_shapes(case.vae.config, 1, hw, pixels=True)


def test_every_streaming_split_encodes_as_the_reference(case):
    length = case.lengths[-1]
    video, expected = case.arrays["video"][:, :, :length].float(), case.arrays[f"enc_h_{length}"]
    ways = splits(length, 1, case.vae.config.temporal_stride)
    assert ways
    for parts in ways:
        state, latents = None, []
        for part in video.split(parts, dim=2):
            h, state = case.vae.encode(part, state)
            latents.append(h)
        assert_close(torch.cat(latents, dim=2), expected)


def test_every_streaming_split_decodes_as_the_reference(case):
    length = case.lengths[-1]
    codes = case.arrays[f"summed_codes_{length}"]
    whole_feature, _ = case.vae.decode_features(codes)
    ways = splits(codes.shape[2], 1, 1)
    assert ways
    for parts in ways:
        state = feature_state = None
        pixels, features = [], []
        for part in codes.split(parts, dim=2):
            x, state = case.vae.decode(part, state)
            f, feature_state = case.vae.decode_features(part, feature_state)
            pixels.append(x)
            features.append(f)
        assert_close(torch.cat(pixels, dim=2), case.arrays[f"decode_{length}"])
        assert_close(torch.cat(features, dim=2), case.arrays[f"up_last_{length}"])
        assert_close(torch.cat(features, dim=2), whole_feature, STREAM_TOLERANCE)


def test_a_prefix_encodes_to_the_prefix_of_the_latents(case):
    whole, _ = case.vae.encode(case.arrays["video"][:, :, : case.lengths[-1]].float())
    for length in case.lengths[:-1]:
        expected = case.arrays[f"enc_h_{length}"]
        assert_close(whole[:, :, : expected.shape[2]], expected)


def test_transform_equals_the_reference_exactly(golden):
    with np.load(golden("video_vae") / "transform_io.npz") as arrays:
        names = [key for key in arrays.files if key.startswith("img")]
        assert names
        for name in names:
            expected = arrays[name.replace("img", "out")]
            np.testing.assert_array_equal(transform(arrays[name], expected.shape[1:]), expected)


def test_the_released_layout_has_the_same_keys_shapes_and_size(golden):
    layout = json.loads((golden("video_vae") / "released_layout_vae.json").read_text())
    expected = {key: tuple(shape) for key, (shape, dtype) in layout.items() if dtype.startswith("float")}
    with torch.device("meta"):
        vae = VideoVAE(preset("worldvln-8b").video_vae)
    assert {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()} == expected
    assert sum(p.numel() for p in vae.parameters()) == sum(int(np.prod(shape)) for shape in expected.values())


def test_released_states_have_the_specified_size():
    """Elements of spec/video_vae.md 8 at 640x640, in millions."""
    config = preset("worldvln-8b").video_vae
    shapes = [
        encoder_state_shapes(config, 1, (640, 640)),
        decoder_state_shapes(config, 1, (640, 640), pixels=False),
        decoder_state_shapes(config, 1, (640, 640), pixels=True),
    ]
    assert [len(each) for each in shapes] == [25, 32, 33]
    millions = [sum(int(np.prod(shape)) for shape in each) / 1e6 for each in shapes]
    assert millions == pytest.approx([734.8, 496.6, 575.3], abs=0.1)
