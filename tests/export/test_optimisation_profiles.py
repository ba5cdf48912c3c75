"""Profiles cover what a flight runs and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.bundle import GraphEntry, TensorSpec
from worldvln_edge.export.optimisation_profiles import ProfileError, Span, graph_profiles
from worldvln_edge.presets import preset
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.scale_tables import ScaleTables
from worldvln_edge.scale_schedule import ScaleSchedule

PRESETS = ("nano", "mini", "worldvln-8b")


def entry(**inputs: tuple[int | str, ...]) -> GraphEntry:
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in inputs.items())
    return GraphEntry(file="graph.onnx", opset=24, precision="fp32", inputs=specs, outputs=())


def step_entry(config) -> GraphEntry:
    model, (rows, cols) = config.world_model, config.schedule.latent_hw
    bits = model.semantic_bits + model.detail_bits
    return entry(
        codes=(1, model.latent_channels, "t", rows, cols),
        area_h=("h", rows),
        area_w=("w", cols),
        up_h=(rows, "h"),
        up_w=(cols, "w"),
        uniforms=("t", "h", "w", bits),
        forced_bits=("t", "h", "w", bits),
        rope=(2, "t", "h", "w", model.head_dim // 2),
        bit_mask=(bits,),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_generated_step_has_a_profile_of_exactly_its_shapes(name: str) -> None:
    config = preset(name)
    tables = ScaleTables(config)
    profiles = graph_profiles(graphs.WORLD_MODEL_STEP, step_entry(config), config, rows=2)
    seen = []
    for clip in tables.schedule.clips[1:]:
        for step in clip.steps:
            constants = tables.constants(step)
            found = {key: Span.fixed(np.shape(constants[key])) for key in ("area_h", "area_w", "up_h", "up_w")}
            found["rope"] = Span.fixed(tables.rope(step).reshape(2, *step.thw, -1).shape)
            found["uniforms"] = found["forced_bits"] = Span.fixed((*step.thw, tables.joint_bits))
            (match,) = [p for p in profiles if {key: p[key] for key in found} == found]
            seen.append(match)
    assert [profile for profile in profiles if profile not in seen] == []
    assert all("bit_mask" not in profile for profile in profiles)


@pytest.mark.parametrize("name", PRESETS)
def test_context_covers_every_text_length_and_every_scale_that_is_referred_to(name: str) -> None:
    config = preset(name)
    width, rope = config.world_model.width, config.world_model.head_dim // 2
    graph = entry(embeds=(graphs.GUIDANCE_ROWS, "n", width), rope=(2, "n", rope))
    profiles = graph_profiles(graphs.WORLD_MODEL_CONTEXT, graph, config, rows=2)
    schedule = ScaleSchedule(config.schedule, 1 + (config.horizon.num_frames - 1) // 4)
    referred = {
        schedule.last_step(clip.index, scale).tokens
        for clip in schedule.clips
        for scale in schedule.scales_referred_to(clip.index)
    }
    fixed = {p["embeds"].best[1] for p in profiles if p["embeds"].lowest[1] == p["embeds"].highest[1]}
    (text,) = [p for p in profiles if p["embeds"].lowest[1] != p["embeds"].highest[1]]
    assert all((p["embeds"].lowest[0], p["embeds"].best[0], p["embeds"].highest[0]) == (1, 2, 2) for p in profiles)
    assert fixed == referred
    assert (text["embeds"].lowest[1], text["embeds"].highest[1]) == (1, config.world_model.text_max_tokens)
    assert all(p["embeds"].best[1] == p["rope"].best[1] for p in profiles)


def test_released_model_has_one_profile_a_scale() -> None:
    config = preset("worldvln-8b")
    profiles = graph_profiles(graphs.WORLD_MODEL_STEP, step_entry(config), config, rows=2)
    assert [p["uniforms"].best[:3] for p in profiles][0::13] == [(4, 1, 1), (4, 40, 40)]
    assert len(profiles) == 14


@given(groups=st.integers(1, 40))
def test_encoder_takes_any_number_of_whole_groups_that_a_horizon_encodes(groups: int) -> None:
    config = preset("nano")
    graph = entry(frames=(1, 3, "f", 64, 64))
    profiles = graph_profiles(graphs.first_or_next(graphs.VAE_ENCODER, False), graph, config, rows=2)
    needed = 1 + groups * 4 <= config.horizon.points[-2]
    assert any(p["frames"].lowest[2] <= 4 * groups <= p["frames"].highest[2] for p in profiles) == needed


def test_action_head_sees_the_windows_of_the_first_and_of_later_segments() -> None:
    config = preset("nano")
    profiles = graph_profiles(graphs.ACTION_HEAD, entry(tokens=("f", 16, 96)), config, rows=2)
    assert [p["tokens"].best[0] for p in profiles] == [17, 19]


@pytest.mark.parametrize("name", PRESETS)
def test_range_style_spans_all_exact_profiles_with_one(name: str) -> None:
    config = preset(name)
    exact = graph_profiles(graphs.WORLD_MODEL_STEP, step_entry(config), config, rows=2)
    (whole,) = graph_profiles(graphs.WORLD_MODEL_STEP, step_entry(config), config, rows=2, style="range")
    for key, span in whole.items():
        assert span.lowest == tuple(np.min([p[key].lowest for p in exact], 0))
        assert span.highest == span.best == tuple(np.max([p[key].highest for p in exact], 0))


def test_fixed_graphs_need_no_profile() -> None:
    assert graph_profiles(graphs.ACTION_ADAPTER, entry(features=(1, 2, 3)), preset("nano"), rows=2) == ()


def test_unknown_graph_and_other_shapes_are_refused_with_their_names() -> None:
    config = preset("nano")
    with pytest.raises(ProfileError, match="graph odd has open dimensions \\(x\\)"):
        graph_profiles("odd", entry(x=("n", 2)), config, rows=2)
    with pytest.raises(ProfileError, match="gives latents the shape \\(1, 1, 64\\), the graph takes"):
        graph_profiles(graphs.LATENT_EMBED, entry(latents=(graphs.GUIDANCE_ROWS, "n", 32)), config, rows=2)
    with pytest.raises(ProfileError, match="no flight shapes are known for input other"):
        graph_profiles(graphs.LATENT_EMBED, entry(other=(graphs.GUIDANCE_ROWS, "n", 32)), config, rows=2)
