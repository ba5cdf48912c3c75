"""Golden tests of the world model: every case of the golden folder, bits forced, sizes read from its config.json."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_world_model import GoldenSet

from worldvln_edge.config import GenerationConfig, ScheduleConfig
from worldvln_edge.models.generation import TextCondition, generate
from worldvln_edge.models.guidance import adaptive_projected_guidance
from worldvln_edge.models.quantizer import (
    bits_of_vectors,
    codes_of_bits,
    encode_bits,
    resize_channels_area,
    resize_channels_trilinear,
)
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.presets import preset
from worldvln_edge.rope import grid_positions, text_rope, visual_rope
from worldvln_edge.scale_schedule import SCALES_PER_PIXEL_BUDGET, ScaleSchedule, aspect_templates

pytestmark = pytest.mark.golden

TOLERANCE = {"input": 1e-6, "summed": 1e-6, "hidden": 1e-4, "logits": 1e-4, "guided": 1e-3}


def _case_names() -> list[str]:
    root = Path(os.environ.get("WORLDVLN_GOLDEN") or Path(__file__).parents[1] / "golden")
    path = root / "world_model" / "config.json"
    return sorted(json.loads(path.read_text())["cases"]) if path.is_file() else ["config.json is missing"]


@pytest.fixture(scope="module")
def reference(golden) -> GoldenSet:
    return GoldenSet(golden("world_model"))


def _unpack(packed: np.ndarray, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = np.unpackbits(packed)[: sum(sizes)].astype(bool)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [torch.from_numpy(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True)]


def _maximum_error(found: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(found.shape) == expected.shape
    return float((found - torch.from_numpy(expected)).abs().max())


@pytest.mark.parametrize("name", _case_names())
def test_generation_reproduces_the_reference_step_by_step(reference: GoldenSet, name: str):
    case, arrays = reference.cases[name], reference.arrays(name)
    schedule = ScaleSchedule(reference.schedule, case["pt"])
    steps = list(schedule.steps())
    scales = reference.schedule.scales_per_clip
    assert [(s.clip * scales + s.scale, s.repetition, s.real_scale_id) for s in steps] == [
        (s["scale"], s["rep"], s["real_scale_id"]) for s in case["steps"]
    ]
    assert [list(c.steps[0].thw[:1]) * scales for c in schedule.clips] == [
        [t for t, _, _ in case["scale_schedule"][k * scales : (k + 1) * scales]] for k in range(len(schedule.clips))
    ]
    config = GenerationConfig(
        cfg=case["cfg"],
        tau_image=case["tau"][0],
        tau_video=case["tau"][-1],
        apg_norm_threshold=reference.raw["apg_norm_threshold"],
        apg_eta=reference.raw["eta"],
    )
    text = TextCondition.build(
        reference.model,
        reference.text["prompt"],
        reference.text["negative"] if case["uncond"] == "negative" else None,
        guided=case["uncond"] is not None,
    )
    forced = _unpack(arrays["bits_packed"], [tuple(s["bits_shape"]) for s in case["steps"]])

    result = generate(reference.model, schedule, text, config, seed=0, forced_bits=forced, record=True)

    assert _maximum_error(result.summed_BcTHW, arrays["final_summed"]) <= TOLERANCE["summed"]
    compared = 0
    for record in result.records:
        prefix = f"s{record.step.clip * scales + record.step.scale:02d}r{record.step.repetition}_"
        values = {
            "input": record.input_BcTHW,
            "hidden": record.hidden_RLC,
            "logits": record.logits_RLd2.flatten(2),
            "guided": record.guided_BLd2.flatten(2),
            "summed": record.summed_BcTHW,
        }
        for kind in values:
            if prefix + kind in arrays:
                compared += 1
                error = _maximum_error(values[kind], arrays[prefix + kind])
                assert error <= TOLERANCE[kind], f"{prefix}{kind}: {error}"
    assert compared == len(arrays) - 2, "some stored arrays were not compared"


@pytest.mark.parametrize("name", _case_names())
def test_kept_keys_and_values_are_those_the_reference_keeps(reference: GoldenSet, name: str):
    case = reference.cases[name]
    schedule = ScaleSchedule(reference.schedule, case["pt"])
    scales = reference.schedule.scales_per_clip
    rows = 1 if case["uncond"] is None else 2
    text = TextCondition.build(reference.model, reference.text["prompt"], guided=rows == 2)
    config = GenerationConfig(cfg=case["cfg"], tau_image=1.0, tau_video=1.0)
    result = generate(reference.model, schedule, text, config, seed=3, record=True)

    referred = {
        clip.index * scales + scale for clip in schedule.clips for scale in schedule.scales_referred_to(clip.index)
    }
    for record, held in zip(result.records, case["kv_shapes_after_step"], strict=True):
        # The reference also stores scales that nobody refers to, until the next step; those are not needed.
        expected = {
            "text" if key == "t0" else f"{int(key) // scales}.{int(key) % scales}": tuple(shape)
            for key, shape in held.items()
            if key == "t0" or int(key) in referred
        }
        assert record.kv_shapes == expected


def test_observed_features_give_the_bits_of_the_reference(reference: GoldenSet):
    arrays = reference.arrays("encoder")
    features = torch.from_numpy(arrays["features"])
    prefixes = {key: features.shape[2] for key in arrays if key == "bits_packed"}
    prefixes |= {key: int(key.removeprefix("bits_packed_pt")) for key in arrays if key.startswith("bits_packed_pt")}
    for key, frames in prefixes.items():
        schedule = ScaleSchedule(reference.schedule, frames)
        found, shapes = [], []
        for clip in schedule.clips:
            bits, summed = encode_bits(features[:, :, clip.frame_slice], clip, reference.model_config)
            assert summed.shape == features[:, :, clip.frame_slice].shape
            found += bits
            shapes += [tuple(b.shape) for b in bits]
        expected = _unpack(arrays[key], shapes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), key


def test_leaked_bits_of_closed_loop_cases_are_the_encoded_ones(reference: GoldenSet):
    features = torch.from_numpy(reference.arrays("encoder")["features"])
    scales = reference.schedule.scales_per_clip
    for name, case in reference.cases.items():
        if not name.startswith("segment"):
            continue
        shapes = [tuple(s["bits_shape"]) for s in case["steps"]]
        used = _unpack(reference.arrays(name)["bits_packed"], shapes)
        schedule = ScaleSchedule(reference.schedule, case["pt"])
        for clip in schedule.clips[: case["gt_leak"] // scales]:
            observed, _ = encode_bits(features[:, :, clip.frame_slice], clip, reference.model_config)
            for step, bits in zip(clip.steps, observed, strict=True):
                assert torch.equal(bits, used[step.real_scale_id]), (name, step)


def test_rotation_tables_match(reference: GoldenSet):
    arrays = reference.arrays("rope")
    head_dim = reference.model_config.head_dim
    frames = sum(t for t, _, _ in reference.raw["full_schedule"][:: reference.schedule.scales_per_clip])
    schedule = ScaleSchedule(reference.schedule, frames)
    for key, expected in arrays.items():
        if key == "freqs_text":
            found = text_rope(expected.shape[1], head_dim)
        else:
            sid, repetition = int(key[1:3]), int(key[4:])
            clip, scale = divmod(sid, reference.schedule.scales_per_clip)
            step = next(s for s in schedule.clips[clip].steps if (s.scale, s.repetition) == (scale, repetition))
            found = visual_rope(
                step,
                schedule.clips[clip].first_frame,
                reference.schedule.latent_hw,
                reference.model_config.text_max_tokens,
                head_dim,
            )
        assert found.shape == expected.shape, key
        assert np.abs(found - expected).max() <= 1e-6, key


def test_clips_and_references_of_the_tiny_schedule_match(reference: GoldenSet):
    full = reference.raw["full_schedule"]
    scales = reference.schedule.scales_per_clip
    frames = sum(t for t, _, _ in full[::scales])
    schedule = ScaleSchedule(reference.schedule, frames)
    for sid, info in reference.raw["scale_pack_info"].items():
        clip, scale = divmod(int(sid), scales)
        span = schedule.clips[clip].frame_slice
        assert (clip, span.start, span.stop) == (info["clipid"], info["frame_ss"], info["frame_ee"])
        assert [c * scales + s for c, s in schedule.references_of_scale(clip, scale)] == info["ref_sids"]
        assert list(schedule.last_step(clip, scale).thw) == full[int(sid)]


def test_guidance_units_match(reference: GoldenSet):
    arrays, units = reference.arrays("units"), reference.units
    names = [key.removesuffix("_cond") for key in arrays if key.endswith("_cond")]
    assert names
    for name in names:
        found = adaptive_projected_guidance(
            torch.from_numpy(arrays[f"{name}_cond"]),
            torch.from_numpy(arrays[f"{name}_uncond"]),
            units["apg_g"],
            units["apg_norm_threshold"],
            units["apg_eta"],
        )
        assert _maximum_error(found, arrays[f"{name}_out"]) <= 1e-5, name


def test_resize_and_quantiser_units_match(reference: GoldenSet):
    arrays = reference.arrays("units")
    for name, resize in (("interp_up", resize_channels_trilinear), ("interp_down", resize_channels_area)):
        expected = arrays[f"{name}_out"]
        found = resize(torch.from_numpy(arrays[f"{name}_in"]), expected.shape[1], expected.shape[-2:])
        assert _maximum_error(found, expected) <= 1e-6, name
    for kind in ("semantic", "detail"):
        bits = bits_of_vectors(torch.from_numpy(arrays[f"lfq_{kind}_in"]))
        assert np.array_equal(bits.numpy().reshape(-1), arrays[f"lfq_{kind}_bits"].astype(bool).reshape(-1)), kind
        codes = codes_of_bits(bits)
        assert _maximum_error(codes, arrays[f"lfq_{kind}_codes"].reshape(codes.shape)) <= 1e-6, kind
        assert _maximum_error(codes, arrays[f"lfq_{kind}_quant"].reshape(codes.shape)) <= 1e-6, kind


def test_released_8b_layout_is_reproduced(golden):
    layout = json.loads((golden("world_model") / "released_layout_8b.json").read_text())
    with torch.device("meta"):
        model = WorldModel(preset("worldvln-8b").world_model).cast_blocks(torch.bfloat16)
    found = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in model.state_dict().items()
    }
    assert found == layout


def test_aspect_templates_match(golden):
    tables = json.loads((golden("world_model") / "schedule_tables.json").read_text())
    templates = aspect_templates()
    assert list(templates) == [float(key) for key in tables["templates_hw"]]
    for key, sizes in tables["templates_hw"].items():
        assert [list(hw) for hw in templates[float(key)]] == sizes
    assert tables["scales_per_pn"] == SCALES_PER_PIXEL_BUDGET


def test_published_schedules_match(golden):
    tables = json.loads((golden("world_model") / "schedule_tables.json").read_text())
    for table in tables["schedules"].values():
        scales = table["scales_in_one_clip"]
        config = ScheduleConfig(
            scale_hw=aspect_templates()[1.0][:scales],
            image_repetition=(1,) * scales,
            video_repetition=(1,) * scales,
            semantic_scales=0,
            frames_inner_clip=int(table["name"].split("_clip")[1].split("frames")[0]),
        )
        assert scales == SCALES_PER_PIXEL_BUDGET[table["pn"]]
        for frames, lengths in table["frame_lengths_per_clip"].items():
            assert [clip.frames for clip in ScaleSchedule(config, int(frames)).clips] == lengths
        for frames, expected in table["cases"].items():
            schedule = ScaleSchedule(config, int(frames))
            for clip, first in zip(schedule.clips, expected["first_scale_of_clip"], strict=True):
                assert clip.index * scales == first["sid"]
                assert (clip.frame_slice.start, clip.frame_slice.stop) == (first["frame_ss"], first["frame_ee"])
                references = [
                    [c * scales + s for c, s in schedule.references_of_scale(clip.index, j)] for j in range(scales)
                ]
                assert references[0] == first["ref_sids"]
                assert (references.count(references[0]) == scales) == first["same_refs_for_all_scales_of_clip"]


def test_row_and_column_positions_match(golden):
    tables = json.loads((golden("world_model") / "schedule_tables.json").read_text())
    for entries in tables["rope_indices"].values():
        rows, cols = entries[-1]["hw"]
        for entry in entries:
            h, w = entry["hw"]
            assert grid_positions(h, rows).tolist() == entry["h_index"]
            assert grid_positions(w, cols).tolist() == entry["w_index"]
