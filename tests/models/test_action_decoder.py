"""Action heads at nano size: windows, exact savings, errors."""

import msgspec
import numpy as np
import pytest
import torch

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import AdapterConfig, ConfigError
from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.timesformer import TimesFormer
from worldvln_edge.presets import preset

CONFIG = preset("nano").action_decoder
CHANNELS = preset("nano").video_vae.feature_channels
WINDOW = CONFIG.latent_head.window
STATS = LabelStats(
    mean_angles=(0.01, 0.0, 0.0), std_angles=(0.1, 0.2, 0.3), mean_t=(0.2, 0.0, 0.0), std_t=(0.1, 0.1, 0.1)
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    module.requires_grad_(False).eval()
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="module")
def head() -> LatentActionHead:
    return randomised(LatentActionHead(CONFIG, CHANNELS))


@pytest.fixture(scope="module")
def rgb_head() -> RgbActionHead:
    return randomised(RgbActionHead(CONFIG))


def features(frames: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, CHANNELS, frames, 16, 16)


def test_tokens_of_a_frame_do_not_depend_on_other_frames(head):
    x = features(3)
    torch.testing.assert_close(head.tokens(x)[1:2], head.tokens(x[:, :, 1:2]), atol=1e-5, rtol=0)


def test_gathered_windows_equal_windows_given_one_by_one(head):
    tokens = head.tokens(features(6))
    one_by_one = torch.cat([head.tsformer(tokens[None, k : k + WINDOW]) for k in range(6 - WINDOW + 1)])
    torch.testing.assert_close(head(features(6)), one_by_one, atol=1e-5, rtol=0)


def test_the_short_last_block_gives_the_class_token_of_the_full_one(head):
    tokens = head.tokens(features(WINDOW))[None]
    trace = []
    full = head.tsformer(tokens, trace)
    assert len(trace) == CONFIG.latent_head.depth
    torch.testing.assert_close(head.tsformer(tokens), full, atol=1e-5, rtol=0)


def test_actions_come_for_every_step_of_the_segment(head):
    tokens = head.tokens(features(19))
    actions = head.actions(tokens, STATS, observed_frames=17, next_observed_frames=33)
    assert actions.shape == (16, 6)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()
    with pytest.raises(ValueError, match=r"zip|frames|windows"):
        head.actions(tokens[:-1], STATS, observed_frames=17, next_observed_frames=33)


def test_the_rgb_head_gives_the_same_actions_in_every_batch_size(rgb_head):
    frames = np.random.default_rng(0).integers(0, 256, (17, 40, 56, 3), np.uint8)
    span = {"observed_frames": 1, "next_observed_frames": 17}
    at_once = rgb_head.actions(frames, STATS, batch_size=None, **span)
    np.testing.assert_allclose(rgb_head.actions(frames, STATS, batch_size=3, **span), at_once, atol=1e-3)
    strided = rgb_head.actions(frames, STATS, stride=3, pre_resize_hw=(48, 48), **span)
    assert strided.shape == (16, 6)
    assert (np.abs(strided).sum(1) > 0).all()


@pytest.mark.parametrize("stride", [0, WINDOW])
def test_a_stride_that_leaves_motions_out_is_refused(rgb_head, stride):
    tokens = torch.zeros(8, CONFIG.rgb_head.tokens_per_frame, CONFIG.rgb_head.width)
    with pytest.raises(ValueError, match="stride must be 1"):
        rgb_head.logits(tokens, stride=stride)


def test_wrong_shapes_are_refused(head, rgb_head):
    tokens = head.tokens(features(5))
    with pytest.raises(ValueError, match="features must be"):
        head.tokens(features(2)[:, 1:])
    with pytest.raises(ValueError, match="features must be"):
        head.tokens(features(2)[0])
    with pytest.raises(ValueError, match="one sequence"):
        head(features(5).repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="send at least"):
        head.logits(tokens[:3])
    with pytest.raises(ValueError, match="windows must be"):
        head.tsformer(tokens[None, :3])
    with pytest.raises(ValueError, match="tokens must be"):
        head.tsformer.forward_frames(tokens[:, 1:], [0])
    with pytest.raises(ValueError, match="do not lie inside"):
        head.tsformer.forward_frames(tokens, [2])
    with pytest.raises(ValueError, match="frames must be"):
        rgb_head.tokens(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match="batch_size must be"):
        rgb_head.logits(torch.zeros(4, 16, 96), batch_size=0)


def test_sizes_that_do_not_divide_are_a_config_error():
    with pytest.raises(ConfigError, match="adapter"):
        Adapter(AdapterConfig(resize_hw=(18, 16), hidden=32, groups=8, patch=4), 8, 16)
    with pytest.raises(ConfigError, match="timesformer"):
        TimesFormer(msgspec.structs.replace(CONFIG.latent_head, heads=5))
    with pytest.raises(ConfigError, match="depth must be"):
        TimesFormer(msgspec.structs.replace(CONFIG.latent_head, depth=0))


def test_the_skip_branch_is_added_only_when_asked_for():
    torch.manual_seed(0)
    plain = Adapter(CONFIG.adapter, CHANNELS, 24)
    skipping = Adapter(CONFIG.adapter, CHANNELS, 24, use_skip=True)
    assert set(skipping.state_dict()) - set(plain.state_dict()) == {"skip.weight"}
    skipping.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.zeros_(skipping.skip.weight)
    torch.testing.assert_close(skipping(features(2)), plain(features(2)))
    torch.nn.init.ones_(skipping.skip.weight)
    assert not torch.allclose(skipping(features(2)), plain(features(2)))


def test_the_time_embedding_starts_as_wide_as_asked():
    torch.manual_seed(0)
    narrow, wide = (
        TimesFormer(CONFIG.latent_head, time_embed_std=std).time_embed.detach().std() for std in (0.02, 0.7)
    )
    assert float(narrow) < 0.03
    assert 0.5 < float(wide) < 0.8


def test_stochastic_depth_acts_in_training_only(head):
    model = TimesFormer(CONFIG.latent_head, drop_path=0.5)
    tokens = head.tokens(features(WINDOW))[None]
    model.eval()
    torch.testing.assert_close(model(tokens), model(tokens), atol=0, rtol=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.train()
    torch.manual_seed(0)
    assert len({tuple(model(tokens)[0].tolist()) for _ in range(8)}) > 1
