"""What a backbone run will need: memory of a rank, tokens, FLOP and time of a step, from sizes alone.

Parameters, gradients and optimiser state are exact. FLOP are those of products (one multiply-add is two); norms,
activations and the frozen VAE and text encoder are left out. Activations are what autograd keeps between forward and
backward; kernels' own scratch memory is not in them.

Source: spec/training.md 1.5, 2.1, 2.7; spec/world_model.md 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from worldvln_edge.config import ConfigError, ModelConfig, WorldModelConfig
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.trainer.gpus import Gpu
from worldvln_edge.world_model_flops import SequenceTokens, block_matrices, sequence_macs, training_flops

_FP32, _BF16 = 4, 2
RESERVE = 1.1
"""Times the sum: allocator fragmentation and kernel scratch."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimiser: int
    average: int
    gathered: int
    """Blocks that are whole while they run (this and the next), and the unit of everything outside the blocks."""
    activations: int

    @property
    def total(self) -> int:
        parts = (self.parameters, self.gradients, self.optimiser, self.average, self.gathered, self.activations)
        return int(RESERVE * sum(parts))


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one optimiser step on all ranks."""

    tokens: int
    flops: int
    """With the forward pass that checkpointing repeats."""
    seconds: float


def parameter_count(model: WorldModelConfig) -> int:
    """Parameters of `WorldModel(model)`."""
    outside = model.text_max_tokens * model.text_channels + model.width  # cfg_uncond, sos_token
    outside += (model.text_channels + 1) * model.width + (model.latent_channels + 1) * model.width
    outside += model.width + 2 * (model.semantic_bits + model.detail_bits) * (model.width + 1)
    return outside + model.depth * block_parameters(model)


def block_parameters(model: WorldModelConfig) -> int:
    """Parameters of one block: matrices, two norms of the stream, norms of queries and keys, biases."""
    bias = 2 * (model.width + model.kv_heads * model.head_dim) if model.qkvo_bias else 0
    return block_matrices(model) + 2 * model.width + 2 * model.head_dim + bias


def adamw_bytes(parameters: int, tensors: int) -> int:
    """State of AdamW: two moments of every parameter and a step count of every tensor, fp32."""
    return _FP32 * (2 * parameters + tensors)


def parameter_tensors(model: WorldModelConfig) -> int:
    """Tensors among the parameters."""
    return 11 + model.depth * (11 + (4 if model.qkvo_bias else 0))


def row_tokens(config: ModelConfig, *, frames: int) -> SequenceTokens:
    """One row with all its scales and the longest text (spec/training.md 1.5, 2.4).

    Raises:
        ConfigError: not 4k+1 frames (1 + k times the temporal stride).
    """
    stride, text = config.video_vae.temporal_stride, config.world_model.text_max_tokens
    if frames < 1 or (frames - 1) % stride:
        raise ConfigError(f"rows must have 1 + {stride}*k frames, found {frames}")
    schedule = ScaleSchedule(config.schedule, 1 + (frames - 1) // stride)
    semantic = detail = 0
    pairs = text * text
    for clip in schedule.clips:
        for scale in range(config.schedule.scales_per_clip):
            own = schedule.last_step(clip.index, scale)
            seen = sum(schedule.last_step(*key).tokens for key in schedule.references_of_scale(clip.index, scale))
            pairs += own.tokens * (own.tokens + seen + text)
            semantic += own.tokens * own.is_semantic
            detail += own.tokens * (not own.is_semantic)
    return SequenceTokens(semantic=semantic, detail=detail, text=text, pairs=pairs)


def block_activation_bytes(model: WorldModelConfig) -> int:
    """What autograd keeps of one block for one token, under bf16 autocast and without fused norms.

    Of the stream: fp32 input and result of two norms and of the queries' norm, and five bf16 tensors around the
    products. Of keys and values: the same for the keys' norm, and keys and values in bf16. Of the feed-forward: gate,
    up, the activated gate and their product in bf16.
    """
    width, kv = model.width, model.kv_heads * model.head_dim
    return (6 * _FP32 + 5 * _BF16) * width + (2 * _FP32 + 2 * _BF16) * kv + 4 * _BF16 * model.intermediate


def activation_bytes(model: WorldModelConfig, tokens: SequenceTokens, *, checkpointing: bool) -> int:
    """What autograd keeps of one micro-batch: blocks (with checkpointing their inputs and one block), and logits."""
    visual = tokens.semantic + tokens.detail
    length = visual + tokens.text
    one = length * block_activation_bytes(model)
    blocks = length * model.depth * _BF16 * model.width + one if checkpointing else model.depth * one
    # Input of the last norm and of the heads in fp32; logits, their difference and what the loss keeps of it.
    heads = visual * 2 * _FP32 * model.width
    heads += 4 * _FP32 * (tokens.semantic * model.semantic_bits + tokens.detail * model.detail_bits)
    return blocks + heads


def rank_memory(
    model: WorldModelConfig, tokens: SequenceTokens, *, ranks: int, checkpointing: bool, has_average: bool
) -> RankMemory:
    """Memory of one of `ranks` ranks that share the parameters, each with micro-batches of `tokens`."""
    parameters, tensors = parameter_count(model), parameter_tensors(model)
    block = block_parameters(model)
    shared = -(-_FP32 * parameters // ranks)
    # One process keeps bf16 copies of its weights while a step runs; many gather two blocks and all that is no block.
    outside = parameters - model.depth * block
    gathered = _BF16 * parameters if ranks == 1 else 2 * _BF16 * block + _FP32 * outside
    return RankMemory(
        parameters=shared,
        gradients=shared,
        optimiser=-(-2 * _FP32 * parameters // ranks) + _FP32 * tensors,
        average=shared if has_average else 0,
        gathered=gathered,
        activations=activation_bytes(model, tokens, checkpointing=checkpointing),
    )


def step_cost(
    model: WorldModelConfig,
    tokens: SequenceTokens,
    gpu: Gpu,
    *,
    ranks: int,
    micro_batches: int,
    checkpointing: bool,
    mfu: float,
) -> StepCost:
    """Of a step of `micro_batches` micro-batches, shared over `ranks` GPUs that reach `mfu` of their peak."""
    useful = micro_batches * training_flops(model, tokens)
    macs = sequence_macs(model, tokens)
    computed = useful + (micro_batches * macs.flops if checkpointing else 0)
    rounds = -(-micro_batches // ranks)
    share = useful / micro_batches * rounds  # of the busiest rank; MFU does not count what is computed again
    length = tokens.semantic + tokens.detail + tokens.text
    return StepCost(tokens=micro_batches * length, flops=computed, seconds=share / (gpu.peak_flops * mfu))


def plan_table(
    config: ModelConfig,
    gpu_name: str,
    gpu: Gpu,
    *,
    frames: int,
    micro_rows: int,
    packed_tokens: int | None,
    has_average: bool,
    mfu: float,
) -> str:
    """The plan for 1, 8 and 64 GPUs, with and without activation checkpointing, as text.

    Args:
        config: preset.
        gpu_name, gpu: what to plan for.
        frames: of a row.
        micro_rows: rows of a micro-batch; a step has one micro-batch per GPU.
        packed_tokens: longest micro-batch; a longer row trains on parts of its scales. None: rows are whole.
        has_average: averaged weights are kept.
        mfu: share of the peak that useful work reaches.
    """
    model, whole = config.world_model, row_tokens(config, frames=frames)
    tokens = _times(whole, micro_rows) if packed_tokens is None else _part(whole, packed_tokens - whole.text)
    length = tokens.semantic + tokens.detail + tokens.text
    full_length = whole.semantic + whole.detail + whole.text
    lines = [
        f"{config.name}: {parameter_count(model):,} parameters; a row of {frames} frames has {full_length:,} tokens"
        f", a micro-batch {length:,}",
        f"{gpu_name}: {gpu.peak_flops / 1e12:.0f} TFLOP/s bf16, {gpu.memory_gb:.0f} GB; time at {mfu:.0%} of the peak",
        "memory per rank in GB (10^9 bytes), with a tenth added for the allocator",
        "",
        f"{'GPUs':>4} {'checkpointing':>13} {'parameters':>10} {'gradients':>9} {'optimiser':>9} {'EMA':>6} "
        f"{'gathered':>8} {'activations':>11} {'total':>7} {'fits':>4} "
        f"{'tokens/step':>11} {'FLOP/step':>10} {'s/step':>7}",
    ]
    for ranks in (1, 8, 64):
        for checkpointing in (False, True):
            memory = rank_memory(model, tokens, ranks=ranks, checkpointing=checkpointing, has_average=has_average)
            cost = step_cost(
                model,
                tokens,
                gpu,
                ranks=ranks,
                micro_batches=ranks,
                checkpointing=checkpointing,
                mfu=mfu,
            )
            lines.append(
                f"{ranks:>4} {'yes' if checkpointing else 'no':>13} {memory.parameters / 1e9:>10.1f} "
                f"{memory.gradients / 1e9:>9.1f} {memory.optimiser / 1e9:>9.1f} {memory.average / 1e9:>6.1f} "
                f"{memory.gathered / 1e9:>8.1f} {memory.activations / 1e9:>11.1f} {memory.total / 1e9:>7.1f} "
                f"{'yes' if memory.total <= gpu.memory_gb * 1e9 else 'no':>4} {cost.tokens:>11,} {cost.flops:>10.3g} "
                f"{cost.seconds:>7.2f}"
            )
    return "\n".join(lines)


def _times(row: SequenceTokens, rows: int) -> SequenceTokens:
    """Several rows side by side."""
    return SequenceTokens(
        semantic=rows * row.semantic, detail=rows * row.detail, text=rows * row.text, pairs=rows * row.pairs
    )


def _part(whole: SequenceTokens, longest: int) -> SequenceTokens:
    """A row cut to `longest` visual tokens, all kinds of tokens and pairs in proportion."""
    visual = whole.semantic + whole.detail
    share = min(1.0, longest / visual)
    return SequenceTokens(
        semantic=int(whole.semantic * share),
        detail=int(whole.detail * share),
        text=whole.text,
        pairs=int(whole.pairs * share),
    )
