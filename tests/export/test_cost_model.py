"""Closed formulas count what the ONNX files compute, and give the numbers of the specifications."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from small_models import tiny_config

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.cost_model import CallCost, CostModel
from worldvln_edge.export.graph_sources import graph_sources
from worldvln_edge.export.inspect_bundle import count_macs, load_structure_only, read_structure
from worldvln_edge.export.parameter_counts import graph_parameters, network_parameters
from worldvln_edge.export.planned_tensor import CastReports, PlannedTensor, checkpoint_tensor
from worldvln_edge.export.segment_costs import FlightCosts
from worldvln_edge.export.tracing import fake_model, trace_graph
from worldvln_edge.export.vae_cost import decoder_layers
from worldvln_edge.presets import preset
from worldvln_edge.runtime.worldvln import graphs

L = 32


@pytest.fixture(scope="module")
def released() -> CostModel:
    return CostModel(preset("worldvln-8b"), 2)


def _shapes(config, call: str, *sizes: int) -> dict[str, tuple[int, ...]]:
    """Actual shapes of the inputs with named dimensions."""
    model, (rows, cols), (height, width) = config.world_model, config.schedule.latent_hw, config.image_hw
    vae = config.video_vae
    if call == graphs.TEXT_ENCODER:
        return {"ids": (1, *sizes)}
    if call == graphs.LATENT_EMBED:
        return {"latents": (2, sizes[0], model.latent_channels)}
    if call == graphs.WORLD_MODEL_CONTEXT:
        return {"embeds": (2, sizes[0], model.width), "rope": (2, sizes[0], model.head_dim // 2), "write_index": (2,)}
    if call == graphs.WORLD_MODEL_STEP:
        t, h, w = sizes
        bits = model.semantic_bits + model.detail_bits
        return {
            "uniforms": (t, h, w, bits),
            "codes": (1, model.latent_channels, t, rows, cols),
            "area_h": (h, rows),
            "area_w": (w, cols),
            "up_h": (rows, h),
            "up_w": (cols, w),
            "rope": (2, t, h, w, model.head_dim // 2),
            "write_index": (2,),
        }
    features = (1, vae.feature_channels, sizes[0], height // vae.pixel_patch, width // vae.pixel_patch)
    codes = (1, vae.raw_channels, sizes[0], rows, cols)
    head, rgb = config.action_decoder.latent_head, config.action_decoder.rgb_head
    return {
        "vae_encoder_next": {"frames": (1, 3, sizes[0], height, width)},
        "vae_decoder_next": {"codes": codes},
        "vae_pixels_next": {"codes": codes, "features": (*features[:2], 4 // 2 * sizes[0], *features[3:])},
        graphs.ACTION_ADAPTER: {"features": features},
        graphs.ACTION_HEAD: {"tokens": (sizes[0], head.tokens_per_frame, head.width)},
        graphs.RGB_HEAD: {"images": (sizes[0], 3, *rgb.image_hw)},
    }.get(call, {})


CALLS: dict[str, tuple[Callable[[CostModel], CallCost], tuple[int, ...]]] = {
    graphs.TEXT_ENCODER: (lambda m: m.text_encoder(5), (5,)),
    graphs.LATENT_EMBED: (lambda m: m.latent_embed(6), (6,)),
    graphs.WORLD_MODEL_CONTEXT: (lambda m: m.context(7, 4), (7,)),
    graphs.WORLD_MODEL_STEP: (lambda m: m.step((2, 1, 2), 7), (2, 1, 2)),
    "vae_encoder_first": (lambda m: m.vae_encoder(True, 1), (1,)),
    "vae_encoder_next": (lambda m: m.vae_encoder(False, 4), (4,)),
    "vae_decoder_first": (lambda m: m.vae_decoder(True, 1), (1,)),
    "vae_decoder_next": (lambda m: m.vae_decoder(False, 3), (3,)),
    "vae_pixels_first": (lambda m: m.vae_pixels(True, 1), (1,)),
    "vae_pixels_next": (lambda m: m.vae_pixels(False, 2), (2,)),
    graphs.ACTION_ADAPTER: (lambda m: m.action_adapter(5), (5,)),
    graphs.ACTION_HEAD: (lambda m: m.action_head(7), (7,)),
    graphs.RGB_HEAD: (lambda m: m.rgb_head(8), (8,)),
}
VISIBLE = 11  # of both world model calls above: 7 + 4 and 4 + 7


@pytest.mark.parametrize("graph", list(CALLS))
def test_formula_equals_the_count_over_the_onnx_nodes(tiny_bundle: Path, graph: str):
    bundle = Bundle.open(tiny_bundle)
    make, sizes = CALLS[graph]
    model = CostModel(tiny_config(), 2)
    cost = make(model)
    found = load_structure_only(bundle.graph_path(graph))
    if graph in (graphs.ACTION_HEAD, graphs.RGB_HEAD):
        found = _with_attention_nodes(graph)
    weights, attention = count_macs(found, _shapes(tiny_config(), graph, *sizes), visible=VISIBLE)
    if graph.startswith(graphs.VAE_DECODER):
        weights += _merged_norm_convolutions(found, sizes[0])
    assert cost.graph == graph
    assert (cost.weight_macs, cost.attention_macs) == (weights, attention)


def _with_attention_nodes(graph: str) -> onnx.ModelProto:
    """The graph in an opset that has Attention: the bundle's spells it out, without stating every shape."""
    mode, model = fake_model(tiny_config(), lambda key: torch.float32)
    keys = {id(parameter): key for key, parameter in model.named_parameters()}

    def weight_of(key: str, parameter: torch.Tensor, transposed: bool) -> PlannedTensor:
        shape = tuple(parameter.shape)
        return checkpoint_tensor(key, shape, parameter.dtype, CastReports(), transposed=transposed)

    with mode:
        (source,) = (one for one in graph_sources(model) if one.name == graph)
    return ir.to_proto(trace_graph(source, keys, weight_of, opset=24, mode=mode).model)


def _merged_norm_convolutions(model: onnx.ModelProto, latents: int) -> int:
    """Multiply-adds that the exporter saved: the tiny model's spatial norms hold equal values, so it merged them."""
    config = tiny_config()
    layers = [x for x in decoder_layers(config.video_vae, config.image_hw, latents, True)[1:] if x.taps == 1]
    kept = [node for node in model.graph.node if node.op_type == "Conv"]
    kernels = {t.name: tuple(t.dims) for t in model.graph.initializer}
    points = sum(kernels[node.input[1]][2:] == (1, 1, 1) for node in kept)
    assert len({layer.macs for layer in layers}) == 1
    return (len(layers) - points) * layers[0].macs


@pytest.mark.parametrize("graph", list(CALLS))
def test_parameters_of_a_graph_equal_its_file(tiny_bundle: Path, graph: str):
    # Equal vectors (norms at their first value) are stored once, and the projection of text is stored in two layouts.
    model = load_structure_only(Bundle.open(tiny_bundle).graph_path(graph))
    found = read_structure(graph, model).parameters
    assert graph_parameters(tiny_config())[graph].total == pytest.approx(found, rel=0.12)


def test_matrices_of_the_step_equal_its_file(tiny_bundle: Path):
    model = load_structure_only(Bundle.open(tiny_bundle).graph_path(graphs.WORLD_MODEL_STEP))
    stored = sum(math.prod(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2)
    world = tiny_config().world_model
    ends = world.width * (world.latent_channels + 2 * (world.semantic_bits + world.detail_bits))
    assert graph_parameters(tiny_config())[graphs.WORLD_MODEL_STEP].matrices + ends == stored


def test_token_steps_and_calls_are_those_of_the_specification(released: CostModel):
    flight = FlightCosts(released, L)
    assert [flight.minimal(i).token_steps for i in range(3)] == [31_552 + L, 36_928, 38_800]
    assert [flight.minimal(i).world_model_calls for i in range(3)] == [41, 41, 42]
    assert [flight.full_horizon(i).token_steps for i in range(3)] == [101_568 + L] * 3
    assert [flight.full_horizon(i).world_model_calls for i in range(3)] == [160] * 3


def test_compute_of_the_world_model_is_that_of_the_specification(released: CostModel):
    flight = FlightCosts(released, L)
    world = (graphs.WORLD_MODEL_CONTEXT, graphs.WORLD_MODEL_STEP)

    def petaflop(calls) -> float:
        return sum(call.flops for call in calls if call.graph in world) / 1e15

    assert [petaflop(flight.minimal(i).calls) for i in range(3)] == pytest.approx([1.28, 1.71, 1.90], abs=0.015)
    full = [call for call in flight.full_horizon(1).calls if call.graph in world]
    assert sum(2 * call.weight_macs for call in full) / 1e15 == pytest.approx(3.56, abs=0.01)
    assert sum(2 * call.attention_macs for call in full) / 1e15 == pytest.approx(0.97, abs=0.01)


def test_parameters_of_the_released_networks_are_those_of_the_specification():
    counts = {name: count.total for name, count in network_parameters(preset("worldvln-8b")).items()}
    assert counts["world_model"] / 1e9 == pytest.approx(8.768, abs=5e-4)
    assert counts["video_vae"] == 184_659_383
    assert counts["action_adapter"] == 12_695_040
    assert counts["latent_head"] == counts["rgb_head"] == 30_662_802


def test_parameters_equal_the_released_layouts(golden: Callable[[str], Path]):
    def elements(layout: dict) -> int:
        return sum(math.prod(shape) for shape, _ in layout.values())

    counts = {name: count.total for name, count in network_parameters(preset("worldvln-8b")).items()}
    world = json.loads((golden("world_model") / "released_layout_8b.json").read_text())
    assert counts["world_model"] == elements(world)


def test_vae_costs_are_those_of_the_specification(released: CostModel):
    def gmac(cost: CallCost) -> float:
        return cost.macs / 1e9

    assert gmac(released.vae_encoder(True, 1)) == pytest.approx(1_560, rel=1e-3)
    assert gmac(released.vae_encoder(False, 16)) == pytest.approx(13_615, rel=1e-3)
    # The table includes the last convolution, and the norms' convolutions at full resolution (0.4 %).
    first = gmac(released.vae_decoder(True, 1)) + gmac(released.vae_pixels(True, 1))
    later = gmac(released.vae_decoder(False, 4)) + gmac(released.vae_pixels(False, 4))
    assert first == pytest.approx(2_560, rel=6e-3)
    assert later == pytest.approx(14_387, rel=6e-3)


def test_vae_states_are_those_of_the_specification(released: CostModel):
    assert released.state_elements(graphs.VAE_ENCODER) / 1e6 == pytest.approx(734.8, abs=0.1)
    assert released.state_elements(graphs.VAE_DECODER) / 1e6 == pytest.approx(496.6, abs=0.1)
    assert released.state_elements(graphs.VAE_PIXELS) / 1e6 == pytest.approx(78.6, abs=0.1)


def test_action_decoder_costs_are_those_of_the_specification(released: CostModel):
    assert released.action_adapter(1).macs / 1e9 == pytest.approx(19.63, abs=0.01)
    window = (released.action_head(19).macs - released.action_head(17).macs) / 2e9
    assert window == pytest.approx(66.40 - 3.55, abs=0.02)  # the last block is read for the class token only (10.4)
    assert released.action_head(17).macs / 14e9 == pytest.approx(window, rel=1e-6)
    head = released.config.action_decoder.rgb_head
    embed = released.rgb_head(17).macs - 14 * window * 1e9
    assert embed / 17e9 == pytest.approx(0.14, abs=0.005), head


def test_int4_and_fp16_bundles_have_the_expected_size():
    world = network_parameters(preset("worldvln-8b"))["world_model"]
    assert world.size_bytes("fp16") <= 17.7e9
    assert world.size_bytes("int4") <= 5.2e9
    assert world.size_bytes("fp32") == 4 * world.total
    with pytest.raises(ValueError, match="unknown precision 'fp12'"):
        world.size_bytes("fp12")


def test_masked_attention_is_charged_for_the_whole_cache():
    inplace, portable = CostModel(tiny_config(), 2), CostModel(tiny_config(), 2, visible_at_least=100)
    assert portable.step((2, 1, 2), 6).attention_macs == 10 * inplace.step((2, 1, 2), 6).attention_macs
    assert portable.step((2, 1, 2), 6).weight_macs == inplace.step((2, 1, 2), 6).weight_macs
