"""VideoVAE at nano size: streaming, errors, training."""

import msgspec
import pytest
import torch

from worldvln_edge.config import ConfigError, VideoVAEConfig
from worldvln_edge.models.vae_layers import patchify, unpatchify
from worldvln_edge.models.video_vae import VideoVAE, decoder_state_shapes, encoder_state_shapes
from worldvln_edge.presets import preset

STREAM_TOLERANCE = 1e-5
HW = (32, 48)


def build(config: VideoVAEConfig) -> VideoVAE:
    """A VAE whose norms, biases and scale are not at their neutral initial values."""
    torch.manual_seed(0)
    vae = VideoVAE(config).requires_grad_(False).eval()
    for parameter in vae.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


CONFIGS = {
    "nano": preset("nano").video_vae,
    "released-like": VideoVAEConfig(block_out_channels=(8, 16, 16, 16, 16), layers_per_block=1, latent_channels=4),
    "early time": VideoVAEConfig(
        block_out_channels=(8, 8, 8, 8), spatial_factors=(1, 2), temporal_factors=(1, 2), pixel_patch=2
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def vae(request) -> VideoVAE:
    return build(CONFIGS[request.param])


def video(vae: VideoVAE, latents: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(batch, 3, 1 + vae.config.temporal_stride * (latents - 1), *HW) * 2 - 1


def codes(vae: VideoVAE, latents: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(2)
    stride = vae.config.spatial_stride
    return torch.randn(batch, vae.config.raw_channels, latents, HW[0] // stride, HW[1] // stride)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=STREAM_TOLERANCE, rtol=0)


def test_streamed_encoding_equals_the_whole(vae):
    frames, unit = video(vae, 5), vae.config.temporal_stride
    whole, _ = vae.encode(frames)
    for first, *later in ([1, 4], [1, 1, 3], [3, 2]):
        cuts, state, parts = [1 + unit * (first - 1), *[unit * n for n in later]], None, []
        for part in frames.split(cuts, dim=2):
            h, state = vae.encode(part, state)
            parts.append(h)
        close(torch.cat(parts, dim=2), whole)
        assert [tuple(s.shape) for s in state] == encoder_state_shapes(vae.config, 2, HW)


def test_streamed_decoding_equals_the_whole(vae):
    z = codes(vae, 5)
    whole, _ = vae.decode(z)
    feature, _ = vae.decode_features(z)
    assert whole.shape == (2, 3, 1 + 4 * vae.config.temporal_stride, *HW)
    for cut in ([1, 4], [1, 1, 3], [2, 3]):
        state, feature_state, pixels, features = None, None, [], []
        for part in z.split(cut, dim=2):
            x, state = vae.decode(part, state)
            f, feature_state = vae.decode_features(part, feature_state)
            pixels.append(x)
            features.append(f)
        close(torch.cat(pixels, dim=2), whole)
        close(torch.cat(features, dim=2), feature)
        assert [tuple(s.shape) for s in state] == decoder_state_shapes(vae.config, 2, HW, pixels=True)
        assert [tuple(s.shape) for s in feature_state] == decoder_state_shapes(vae.config, 2, HW, pixels=False)


def test_pixels_decoded_from_the_feature_equal_one_decode(vae):
    z = codes(vae, 3)
    whole, _ = vae.decode(z)
    state = pixel_state = None
    parts = []
    for part in z.split([1, 2], dim=2):
        feature, state = vae.decode_features(part, state)
        pixels, pixel_state = vae.decode_pixels(feature, part, pixel_state)
        parts.append(pixels)
    close(torch.cat(parts, dim=2), whole)


def test_the_newest_frames_alone_equal_those_of_the_whole_feature(vae):
    z = codes(vae, 3)
    whole, _ = vae.decode_features(z)
    newest, _ = vae.decode_features(z, last_frames=3)
    close(newest, whole[:, :, -3:])
    _, state = vae.decode_features(z[:, :, :1])
    later, cut_state = vae.decode_features(z[:, :, 1:], state, last_frames=3)
    _, full_state = vae.decode_features(z[:, :, 1:], state)
    close(later, whole[:, :, -3:])
    for cut, full in zip(cut_state, full_state, strict=True):
        torch.testing.assert_close(cut, full, atol=0, rtol=0)
    everything, _ = vae.decode_features(z, last_frames=whole.shape[2])
    close(everything, whole)


def test_a_state_is_never_modified(vae):
    frames, z, unit = video(vae, 2), codes(vae, 2), vae.config.temporal_stride
    for call, first, later in (
        (vae.encode, frames[:, :, :1], frames[:, :, 1 : 1 + unit]),
        (vae.decode, z[:, :, :1], z[:, :, 1:]),
    ):
        _, state = call(first)
        copies = [tensor.clone() for tensor in state]
        once, _ = call(later, state)
        again, _ = call(later, state)
        torch.testing.assert_close(again, once, atol=0, rtol=0)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(state, copies, strict=True))


def test_batch_rows_are_independent(vae):
    frames = video(vae, 2)
    both, _ = vae.encode(frames)
    one, _ = vae.encode(frames[1:])
    close(both[1:], one)


def test_wrong_frame_counts_are_refused(vae):
    unit = vae.config.temporal_stride
    frames = video(vae, 3)
    if unit > 1:
        with pytest.raises(ValueError, match="the first call needs 1 \\+"):
            vae.encode(frames[:, :, :unit])
    with pytest.raises(ValueError, match="the first call needs"):
        vae.encode(frames[:, :, :0])
    _, state = vae.encode(frames[:, :, :1])
    with pytest.raises(ValueError, match="a later call needs"):
        vae.encode(frames[:, :, : unit + 1], state)
    with pytest.raises(ValueError, match="a later call needs"):
        vae.encode(frames[:, :, :0], state)


def test_wrong_shapes_and_states_are_refused(vae):
    frames, z = video(vae, 1), codes(vae, 1)
    with pytest.raises(ValueError, match="frames must be"):
        vae.encode(frames[0])
    with pytest.raises(ValueError, match="multiple of"):
        vae.encode(frames[..., :-1])
    with pytest.raises(ValueError, match="streaming state holds 1 tensors"):
        vae.encode(video(vae, 2)[:, :, 1:], (frames,))
    with pytest.raises(ValueError, match="codes must be"):
        vae.decode(z[:, 1:])
    with pytest.raises(ValueError, match="last_frames must be"):
        vae.decode_features(z, last_frames=2)
    feature, _ = vae.decode_features(z)
    with pytest.raises(ValueError, match="feature frames"):
        vae.decode_pixels(feature[:, :, :0], z)
    _, state = vae.decode(z)
    with pytest.raises(ValueError, match="streaming state holds"):
        vae.decode(z, state[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": (32, 64, 64, 32)}, "last two block_out_channels"),
        ({"block_out_channels": (32, 48, 64, 64)}, "does not divide"),
        ({"spatial_factors": (3, 1)}, "must be 1 or 2"),
        ({"temporal_factors": (2, 4)}, "must be 1 or 2"),
        ({"layers_per_block": 0}, "layers_per_block must be >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_a_config_error(change, message):
    with pytest.raises(ConfigError, match=message):
        VideoVAE(msgspec.structs.replace(preset("nano").video_vae, **change))


def test_patchify_is_undone_by_unpatchify_and_orders_channels_as_specified():
    x = torch.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6)
    y = patchify(x, 2)
    torch.testing.assert_close(unpatchify(y, 2), x)
    assert torch.equal(y[:, 1 * 4 + 1 * 2 + 0], x[:, 1, :, 1::2, 0::2])


def test_training_reaches_every_parameter_that_is_not_frozen():
    vae = VideoVAE(preset("nano").video_vae)
    frames = torch.rand(1, 3, 5, *HW) * 2 - 1
    h, _ = vae.encode(frames)
    noise = torch.randn(1, vae.config.raw_channels, 2, HW[0] // 16, HW[1] // 16)
    pixels, _ = vae.decode(vae.raw_features(h, noise))
    (pixels - frames).square().mean().backward()
    without = [name for name, p in vae.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {name for name, p in vae.named_parameters() if not p.requires_grad}
    assert frozen == {f"proj_{way}_two.{part}" for way in ("up", "down") for part in ("weight", "bias")}
