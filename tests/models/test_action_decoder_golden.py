"""Action heads against the reference arrays. Every size is read from the set's config.json and from the arrays."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from worldvln_edge.action_windows import LabelStats, context_frame
from worldvln_edge.config import ActionDecoderConfig, AdapterConfig, TimesFormerConfig
from worldvln_edge.images import predicted_to_uint8, real_to_uint8
from worldvln_edge.models.action_decoder import LatentActionHead, RgbActionHead
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.timesformer import TimesFormer
from worldvln_edge.presets import preset

pytestmark = pytest.mark.golden
TOKEN_TOLERANCE = LOGIT_TOLERANCE = 1e-4
ACTION_TOLERANCE = 1e-2  # cm or deg
RELEASED_GROUPS = preset("worldvln-8b").action_decoder.adapter.groups  # not in the set's config


def decoder_config(config: dict) -> ActionDecoderConfig:
    tsformer, adapter = config["tsformer"], config["adapter"]
    head = TimesFormerConfig(
        image_hw=tuple(tsformer["img_size"]),
        patch=tsformer["patch_size"],
        width=tsformer["embed_dim"],
        depth=tsformer["depth"],
        heads=tsformer["num_heads"],
        mlp_ratio=tsformer["mlp_ratio"],
        window=tsformer["num_frames"],
    )
    return ActionDecoderConfig(
        adapter=AdapterConfig(
            resize_hw=head.image_hw, hidden=adapter["hidden"], groups=RELEASED_GROUPS, patch=adapter["patch_size"]
        ),
        latent_head=head,
        rgb_head=head,
        left_context=config["left_context"],
    )


@pytest.fixture(scope="module")
def case(golden):
    folder = golden("action_decoder")
    config = json.loads((folder / "config.json").read_text())
    decoder = decoder_config(config)
    weights = {k: v.float() for k, v in load_file(folder / "action_decoder_tiny.safetensors").items()}
    latent = LatentActionHead(decoder, config["adapter"]["in_channels"], use_skip=config["adapter"]["use_skip"])
    latent.load_state_dict(weights, strict=True)
    rgb = RgbActionHead(decoder)
    rgb.load_state_dict({k: v for k, v in weights.items() if k.startswith("tsformer.")}, strict=True)
    with np.load(folder / "action_decoder_io.npz") as arrays:
        arrays = {key: arrays[key] for key in arrays.files}
    features = torch.from_numpy(arrays["features"]).float()
    with torch.no_grad():
        tokens = torch.cat([latent.eval().tokens(frame) for frame in features.split(1, dim=2)])
    return SimpleNamespace(
        config=config,
        latent=latent.requires_grad_(False),
        rgb=rgb.eval().requires_grad_(False),
        arrays=arrays,
        tokens=tokens,
        stats=LabelStats(**{name: tuple(values) for name, values in config["label_stats"].items()}),
    )


def assert_within(found, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


def test_adapter_tokens_match_the_reference(case):
    frames = case.config["token_frames_zero_based"]
    names = [key for key in case.arrays if key.startswith("tokens_")]
    assert names
    for name in names:
        assert_within(case.tokens[frames], case.arrays[name], TOKEN_TOLERANCE)


def test_adapter_resizes_real_feature_sizes_as_the_reference(case):
    channels = case.config["adapter"]["in_channels"]
    names = [key for key in case.arrays if key.startswith("adapter_formula_")]
    assert names
    for name in names:
        side = int(name.rsplit("_", 1)[1])
        c, y, x = np.ogrid[:channels, :side, :side]
        feature = np.sin(0.37 * c + 0.05 * y * (1 + c % 3) + 0.11 * x).astype(np.float32)
        tokens = case.latent.tokens(torch.from_numpy(feature)[None, :, None])
        assert_within(tokens[0], case.arrays[name], TOKEN_TOLERANCE)


def test_every_block_of_window_zero_matches_the_reference(case):
    tsformer, arrays, patch = case.latent.tsformer, case.arrays, case.config["probe_patch"]
    trace = []
    logits = tsformer(case.tokens[None, : case.config["window_size"]], trace)
    blocks = [int(m[1]) for key in arrays if (m := re.fullmatch(r"window0_block(\d+)_out_cls", key))]
    assert len(trace) == case.config["tsformer"]["depth"]
    assert blocks
    for block in blocks:
        x_KTND, c_KD = trace[block]
        assert_within(c_KD[0], arrays[f"window0_block{block}_out_cls"], LOGIT_TOLERANCE)
        (tokens,) = (arrays[k] for k in arrays if k.startswith(f"window0_block{block}_out_tok"))
        assert_within(x_KTND[0, :, patch], tokens, LOGIT_TOLERANCE)
    assert_within(tsformer.norm(trace[-1][1])[0], arrays["window0_feature"], LOGIT_TOLERANCE)
    assert_within(logits[0], arrays["window0_logits"], LOGIT_TOLERANCE)


def test_latent_head_matches_the_reference_in_every_segment(case):
    arrays = case.arrays
    for name, segment in case.config["segments"].items():
        observed, end = segment["obs_len"], segment["next_obs_len"]
        first = context_frame(observed, case.config["left_context"])
        assert first == segment["first_context_frame"]
        tokens = case.tokens[first - 1 : end]
        assert_within(case.latent.logits(tokens), arrays[f"logits_{name}"], LOGIT_TOLERANCE)
        for stats, key in ((case.stats, f"actions_{name}"), (None, f"actions_{name}_no_stats")):
            if key in arrays:
                actions = case.latent.actions(tokens, stats, observed_frames=observed, next_observed_frames=end)
                assert_within(actions, arrays[key], ACTION_TOLERANCE)


def test_rgb_head_matches_the_reference_in_every_segment(case):
    frames = case.arrays["ah_frames_rgb"]
    for name, segment in case.config["reference_video"]["segments"].items():
        begin, end = segment["frames_zero_based"]
        actions_expected = case.arrays[f"ah_actions_{name}"]
        horizon = case.config["segments"][name]
        tokens = case.rgb.tokens(case.rgb.preprocess(frames[begin:end]))
        logits = case.rgb.logits(tokens, batch_size=5)
        assert_within(logits, case.arrays[f"ah_logits_{name}"], LOGIT_TOLERANCE)
        actions = case.rgb.actions(
            frames[begin:end],
            case.stats,
            observed_frames=horizon["obs_len"],
            next_observed_frames=horizon["next_obs_len"],
        )
        assert_within(actions, actions_expected, ACTION_TOLERANCE)


def test_rgb_preprocessing_matches_the_reference(case):
    (key,) = (k for k in case.arrays if k.startswith("ah_pre_frame0"))
    rows = case.config["reference_video"]["pre_rows"]
    frame = case.rgb.preprocess(case.arrays["ah_frames_rgb"][:1])[0]
    assert_within(frame[:, rows], case.arrays[key], 1e-6)


def test_uint8_conversions_equal_the_reference_exactly(case):
    arrays = case.arrays
    np.testing.assert_array_equal(real_to_uint8(arrays["u8_in"])[..., ::-1], arrays["u8_real_bgr"])
    np.testing.assert_array_equal(predicted_to_uint8(arrays["u8_in"])[..., ::-1], arrays["u8_pred_bgr"])


def test_the_released_layout_has_the_same_keys_and_shapes(golden):
    layout = json.loads((golden("action_decoder") / "released_layout_action_decoder.json").read_text())
    released = preset("worldvln-8b")
    decoder = released.action_decoder
    with torch.device("meta"):
        modules = {
            "model_state_dict": TimesFormer(decoder.latent_head),
            "adapter_state_dict": Adapter(
                decoder.adapter, released.video_vae.feature_channels, decoder.latent_head.width
            ),
        }
    for name, module in modules.items():
        expected = {key: tuple(shape) for key, (shape, _) in layout[name].items()}
        assert {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} == expected
