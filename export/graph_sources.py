"""Every graph of a bundle: the module to trace, example inputs, names and dynamic axes.

Example sizes are all different, so that no two axes are taken for one.
Source: runtime/worldvln/graphs.py (names, inputs and outputs of every graph).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim

from worldvln_edge.config import ModelConfig, TimesFormerConfig
from worldvln_edge.export.action_graphs import AdapterGraph, RgbGraph, WindowsGraph
from worldvln_edge.export.text_graph import TextGraph
from worldvln_edge.export.video_vae_graphs import DecoderGraph, EncoderGraph, PixelsGraph
from worldvln_edge.export.world_model_graphs import BlockGraph, ContextGraph, KVFlavour, LatentEmbedGraph, StepGraph
from worldvln_edge.models.video_vae import decoder_state_shapes, encoder_state_shapes
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.scale_schedule import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """All that is needed to trace one graph."""

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, object]]
    stack: BlockStack | None = None
    """What the `Blocks` node of the graph stands for."""


@dataclass(frozen=True, kw_only=True)
class BlockStack:
    """Blocks that differ in their weights only: one is traced, and copied for every layer."""

    block: GraphSource
    last: GraphSource | None
    """The last block, where it is another graph than the others."""
    modules: tuple[nn.Module, ...]
    """One per layer, each with the parameter names of `block.module`."""


def guidance_rows(config: ModelConfig) -> int:
    """Rows of the cache: guidance weight 1 needs no unconditional row."""
    return 1 if config.generation.cfg == 1 else 2


def kv_capacity(config: ModelConfig) -> int:
    """Most entries that are visible at once: text, references and the step's own tokens."""
    latent_frames = 1 + (config.horizon.num_frames - 1) // config.video_vae.temporal_stride
    schedule = ScaleSchedule(config.schedule, latent_frames)
    most = 0
    for step in schedule.steps():
        references = schedule.references_of_scale(step.clip, step.scale)
        most = max(most, step.tokens + sum(schedule.last_step(*key).tokens for key in references))
    return config.world_model.text_max_tokens + most


def graph_sources(model: WorldVLN, *, kv: KVFlavour = "inplace", rgb_head: bool = True) -> Iterator[GraphSource]:
    """Every graph of a bundle, in the dtypes that the model's parameters have.

    Args:
        model: may hold fake tensors; then call this under their mode.
        kv: how the cache is written and read, see `world_model_graphs`.
        rgb_head: leave it out where the checkpoint has none.
    """
    yield from _text_and_world_model(model, kv)
    yield from _vae(model)
    yield from _action_heads(model, rgb_head)


def _text_and_world_model(model: WorldVLN, kv: KVFlavour) -> Iterator[GraphSource]:
    config, world = model.config, model.config.world_model
    rows, capacity = guidance_rows(config), kv_capacity(config)
    length = Dim("text_tokens", min=1, max=world.text_max_tokens)
    yield GraphSource(
        name=graphs.TEXT_ENCODER,
        module=TextGraph(model.text_encoder, model.world_model),
        example=(torch.ones(1, 7, dtype=torch.int64),),
        inputs=("ids",),
        outputs=("text_embeds", "uncond_embeds"),
        dynamic={"ids": {1: length}},
    )
    stems = graphs.cache_stems(world.depth)
    past, present = tuple(f"past_{s}" for s in stems), tuple(f"present_{s}" for s in stems)
    tokens = Dim("tokens", min=1, max=capacity)
    # Scales that are not guided run with the instruction's row alone.
    row: dict[int, object] = {0: Dim(graphs.GUIDANCE_ROWS, min=1, max=rows)} if rows > 1 else {}
    per_row = {name: row for name in ("write_index", "kv_length", *past)} if row else {}
    yield GraphSource(
        name=graphs.LATENT_EMBED,
        module=LatentEmbedGraph(model.world_model),
        example=(torch.zeros(rows, 11, world.latent_channels),),
        inputs=("latents",),
        outputs=("embeds",),
        dynamic={"latents": {**row, 1: tokens}},
    )

    def caches() -> tuple[Tensor, ...]:
        dtype = model.world_model.block_dtype
        return tuple(torch.zeros(rows, world.kv_heads, capacity, world.head_dim, dtype=dtype) for _ in stems)

    def position(value: int) -> Tensor:
        return torch.full((rows,), value, dtype=torch.int64)

    yield GraphSource(
        name=graphs.WORLD_MODEL_CONTEXT,
        module=ContextGraph(model.world_model),
        example=(
            torch.zeros(rows, 11, world.width),
            torch.zeros(2, 11, world.head_dim // 2),
            position(0),
            position(11),
            *caches(),
        ),
        inputs=("embeds", "rope", "write_index", "kv_length", *past),
        outputs=present,
        dynamic={"embeds": {**row, 1: tokens}, "rope": {1: tokens}, **per_row},
        stack=_stack(model, kv, context=True),
    )
    frames, h, w = Dim("frames", min=1), Dim("rows", min=1), Dim("cols", min=1)
    t_, h_, w_ = 3, 2, 5
    full_h, full_w = config.schedule.latent_hw
    bits = world.semantic_bits + world.detail_bits
    generation = config.generation
    yield GraphSource(
        name=graphs.WORLD_MODEL_STEP,
        module=StepGraph(
            model.world_model,
            is_guided=rows > 1,
            norm_threshold=generation.apg_norm_threshold,
            eta=generation.apg_eta,
        ),
        example=(
            torch.zeros(1, world.latent_channels, t_, full_h, full_w),
            torch.zeros(h_, full_h),
            torch.zeros(w_, full_w),
            torch.zeros(world.latent_channels, bits),
            torch.zeros(full_h, h_),
            torch.zeros(full_w, w_),
            torch.ones(bits),
            torch.tensor(0.25),
            torch.tensor(2.5),
            torch.tensor(3.0),
            torch.zeros(t_, h_, w_, bits),
            torch.ones(t_, h_, w_, bits),
            torch.tensor(0.0),
            torch.zeros(2, t_, h_, w_, world.head_dim // 2),
            position(0),
            position(t_ * h_ * w_),
            *caches(),
        ),
        inputs=(*graphs.STEP_INPUTS, *past),
        outputs=("next_codes", "bits", "probabilities", *present),
        dynamic={
            "codes": {2: frames},
            "area_h": {0: h},
            "area_w": {0: w},
            "up_h": {1: h},
            "up_w": {1: w},
            "uniforms": {0: frames, 1: h, 2: w},
            "forced_bits": {0: frames, 1: h, 2: w},
            "rope": {1: frames, 2: h, 3: w},
            **per_row,
        },
        stack=_stack(model, kv, context=False),
    )


def _stack(model: WorldVLN, kv: KVFlavour, *, context: bool) -> BlockStack:
    """All blocks of the step; or of a context pass, whose last block has nobody to pass its result on to."""
    config, world = model.config, model.config.world_model
    rows, capacity = guidance_rows(config), kv_capacity(config)
    dtype, tokens = model.world_model.block_dtype, Dim("tokens", min=1, max=capacity)
    row = {0: Dim(graphs.GUIDANCE_ROWS, min=1, max=rows)} if rows > 1 else {}
    per_row = {name: row for name in ("write_index", "kv_length", "past_key", "past_value")} if row else {}

    def source(block: nn.Module, only_kv: bool) -> GraphSource:
        cache_shape = (rows, world.kv_heads, capacity, world.head_dim)
        return GraphSource(
            name="block",
            module=BlockGraph(block, kv=kv, only_kv=only_kv),
            example=(
                torch.zeros(rows, 11, world.width, dtype=dtype),
                torch.zeros(2, 11, world.head_dim // 2),
                torch.zeros(rows, dtype=torch.int64),
                torch.full((rows,), 11, dtype=torch.int64),
                torch.zeros(cache_shape, dtype=dtype),
                torch.zeros(cache_shape, dtype=dtype),
            ),
            inputs=("x", "rope", "write_index", "kv_length", "past_key", "past_value"),
            outputs=("present_key", "present_value") if only_kv else ("next_x", "present_key", "present_value"),
            dynamic={"x": {**row, 1: tokens}, "rope": {1: tokens}, **per_row},
        )

    blocks = list(model.world_model.iterate_blocks())
    return BlockStack(
        block=source(blocks[0], False),
        last=source(blocks[-1], True) if context else None,
        modules=tuple(BlockGraph(block, kv=kv, only_kv=False) for block in blocks),
    )


def _vae(model: WorldVLN) -> Iterator[GraphSource]:
    vae, config = model.vae, model.config.video_vae
    height, width = model.config.image_hw
    rows, cols = model.config.schedule.latent_hw
    stride, feature_hw = config.temporal_stride, (height // config.pixel_patch, width // config.pixel_patch)
    groups = Dim("groups", min=1)

    def states(shapes: list[tuple[int, int, int, int, int]]) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=vae.compute_dtype) for shape in shapes)

    def names(prefix: str, count: int) -> tuple[str, ...]:
        return tuple(f"{prefix}_{i}" for i in range(count))

    def source(stem: str, is_first: bool, module: nn.Module, example, inputs, output, state_shapes, dynamic):
        count = len(state_shapes)
        return GraphSource(
            name=graphs.first_or_next(stem, is_first),
            module=module,
            example=example if is_first else (*example, *states(state_shapes)),
            inputs=inputs if is_first else (*inputs, *names("state", count)),
            outputs=(output, *names("next_state", count)),
            dynamic={} if is_first else dynamic,
        )

    encoder_states = encoder_state_shapes(config, 1, (height, width))
    decoder_states = decoder_state_shapes(config, 1, (height, width), pixels=True)
    for is_first in (True, False):
        latents = 1 if is_first else 3
        frames = 1 if is_first else stride * latents
        codes = torch.zeros(1, config.raw_channels, latents, rows, cols)
        features = torch.zeros(1, config.feature_channels, frames, *feature_hw, dtype=vae.compute_dtype)
        yield source(
            graphs.VAE_ENCODER,
            is_first,
            EncoderGraph(vae, is_first),
            (torch.zeros(1, 3, frames, height, width),),
            ("frames",),
            "latents",
            encoder_states,
            {"frames": {2: stride * groups}},
        )
        yield source(
            graphs.VAE_DECODER,
            is_first,
            DecoderGraph(vae, is_first),
            (codes,),
            ("codes",),
            "features",
            decoder_states[:-1],
            {"codes": {2: groups}},
        )
        yield source(
            graphs.VAE_PIXELS,
            is_first,
            PixelsGraph(vae, is_first),
            (features, codes.clone()),
            ("features", "codes"),
            "pixels",
            decoder_states[-1:],
            {"features": {2: stride * groups}, "codes": {2: groups}},
        )


def _action_heads(model: WorldVLN, rgb_head: bool) -> Iterator[GraphSource]:
    config, vae = model.config.action_decoder, model.config.video_vae
    height, width = model.config.image_hw
    frames = Dim("frames", min=1)

    def windows(head: TimesFormerConfig) -> Dim:
        return Dim("frames", min=head.window + 1)  # tracing takes a single window for a constant

    yield GraphSource(
        name=graphs.ACTION_ADAPTER,
        module=AdapterGraph(model.latent_head),
        example=(
            torch.zeros(
                1,
                vae.feature_channels,
                5,
                height // vae.pixel_patch,
                width // vae.pixel_patch,
                dtype=model.vae.compute_dtype,
            ),
        ),
        inputs=("features",),
        outputs=("tokens",),
        dynamic={"features": {2: frames}},
    )
    yield GraphSource(
        name=graphs.ACTION_HEAD,
        module=WindowsGraph(model.latent_head.tsformer),
        example=(
            torch.zeros(
                config.latent_head.window + 5,
                config.latent_head.tokens_per_frame,
                config.latent_head.width,
                dtype=model.latent_head.tsformer.compute_dtype,
            ),
        ),
        inputs=("tokens",),
        outputs=("logits",),
        dynamic={"tokens": {0: windows(config.latent_head)}},
    )
    if not rgb_head:
        return
    yield GraphSource(
        name=graphs.RGB_HEAD,
        module=RgbGraph(model.rgb_head),
        example=(torch.zeros(config.rgb_head.window + 5, 3, *config.rgb_head.image_hw),),
        inputs=("images",),
        outputs=("logits",),
        dynamic={"images": {0: windows(config.rgb_head)}},
    )
