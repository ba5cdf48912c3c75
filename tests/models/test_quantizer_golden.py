"""Quantiser against the reference arrays: bits on given raw features, and codes on given bits."""

import json
import math
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from worldvln_edge.config import ScheduleConfig, WorldModelConfig
from worldvln_edge.models.quantizer import (
    bits_of_vectors,
    codes_of_bits,
    encode_bits,
    resize_channels_area,
    resize_channels_trilinear,
)
from worldvln_edge.presets import preset
from worldvln_edge.scale_schedule import ScaleSchedule

pytestmark = pytest.mark.golden
CODE_TOLERANCE = 1e-6
ALLOWED_MISMATCH = 1e-5  # of the bits of the real schedule


def schedule_config(config: dict) -> ScheduleConfig:
    scale_hw = tuple(tuple(hw) for hw in config["scale_hw"])
    return ScheduleConfig(
        scale_hw=scale_hw,
        image_repetition=tuple(config["image_scale_repetition"]),
        video_repetition=tuple(config["video_scale_repetition"]),
        semantic_scales=sum(h * w < config["detail_scale_min_tokens"] for h, w in scale_hw),
        frames_inner_clip=config["frames_inner_clip"],
    )


@pytest.fixture(scope="module")
def case(golden):
    folder = golden("video_vae")
    config = json.loads((folder / "config.json").read_text())
    model: WorldModelConfig = msgspec.structs.replace(
        preset("worldvln-8b").world_model,
        semantic_bits=config["semantic_scale_dim"],
        detail_bits=config["detail_scale_dim"],
    )
    return SimpleNamespace(folder=folder, config=config, model=model)


def encode(features: torch.Tensor, schedule: ScaleSchedule, model: WorldModelConfig):
    """Bits of every step of every clip, and the summed codes of the whole sequence."""
    bits, codes = [], []
    for clip in schedule.clips:
        clip_bits, clip_codes = encode_bits(features[:, :, clip.frame_slice], clip, model)
        bits += clip_bits
        codes.append(clip_codes)
    return bits, torch.cat(codes, dim=2)


def test_bits_and_codes_of_the_narrow_set_are_exact(case):
    with np.load(case.folder / "vae_tiny_io.npz") as file:
        arrays = {key: file[key] for key in file.files}
    lengths = [int(key.removeprefix("z_mean_")) for key in arrays if key.startswith("z_mean_")]
    assert lengths
    for length in lengths:
        features = torch.from_numpy(arrays[f"z_mean_{length}"])
        schedule = ScaleSchedule(schedule_config(case.config), features.shape[2])
        bits, codes = encode(features, schedule, case.model)
        steps = list(schedule.steps())
        assert len(steps) == sum(key.startswith(f"bits_{length}_") for key in arrays)
        for step, found in zip(steps, bits, strict=True):
            index = step.clip * schedule.config.scales_per_clip + step.scale
            expected = arrays[f"bits_{length}_s{index}_r{step.repetition}"]
            np.testing.assert_array_equal(found.numpy().astype(np.uint8), expected)
        np.testing.assert_allclose(codes, arrays[f"summed_codes_{length}"], rtol=0, atol=CODE_TOLERANCE)


def test_bits_of_the_real_schedule_differ_in_one_of_a_hundred_thousand_at_most(case):
    with np.load(case.folder / "quantizer_real_schedule.npz") as file:
        arrays = {key: file[key] for key in file.files}
    features = torch.from_numpy(arrays["raw_features"]).float()
    schedule = ScaleSchedule(schedule_config(case.config["real_schedule"]), features.shape[2])
    scales = {(step.clip, step.scale): step.thw for step in schedule.steps()}
    np.testing.assert_array_equal(list(scales.values()), arrays["schedule"])
    bits, codes = encode(features, schedule, case.model)
    assert [tuple(found.shape) for found in bits] == [tuple(shape) for shape in arrays["bit_shapes"].tolist()]
    found = np.concatenate([each.numpy().ravel() for each in bits])
    expected = np.unpackbits(arrays["bits_packed"], count=found.size).astype(bool)
    assert (found != expected).mean() <= ALLOWED_MISMATCH
    if (found == expected).all():  # a flip feeds all later repetitions, so codes are compared only without one
        np.testing.assert_allclose(codes[..., ::5, ::5], arrays["summed_codes_stride5"], rtol=0, atol=CODE_TOLERANCE)
    np.testing.assert_allclose(codes[0].double().mean((-1, -2)), arrays["summed_codes_mean"], rtol=0, atol=1e-3)


def test_bits_and_codes_of_vectors_are_exact(case):
    with np.load(case.folder / "quantizer_primitives.npz") as file:
        arrays = {key: file[key] for key in file.files}
    kinds = [key.removesuffix("_x") for key in arrays if key.endswith("_x")]
    assert kinds
    for kind in kinds:
        bits = bits_of_vectors(torch.from_numpy(arrays[f"{kind}_x"]))
        np.testing.assert_array_equal(bits.numpy().astype(np.uint8), arrays[f"{kind}_bits"])
        codes = codes_of_bits(bits)
        np.testing.assert_allclose(codes, arrays[f"{kind}_codes"], rtol=0, atol=1e-7)
        assert float(codes.abs().max()) == pytest.approx(1 / math.sqrt(codes.shape[1]))


def test_interpolation_matches_the_reference(case):
    with np.load(case.folder / "quantizer_primitives.npz") as file:
        arrays = {key: file[key] for key in file.files}
    names = [key.removesuffix("_in") for key in arrays if key.startswith("interp_") and key.endswith("_in")]
    assert names
    for name in names:
        expected = arrays[f"{name}_out"]
        resize = resize_channels_area if name.startswith("interp_down") else resize_channels_trilinear
        found = resize(torch.from_numpy(arrays[f"{name}_in"]), expected.shape[1], expected.shape[-2:])
        np.testing.assert_allclose(found, expected, rtol=0, atol=CODE_TOLERANCE)
