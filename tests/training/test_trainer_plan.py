"""What a backbone run will need, against what is really counted on `mini`."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldvln_edge.config import ConfigError
from worldvln_edge.models.attention_mask import all_scales, document_matrix, visual_tokens
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.presets import PRESET_NAMES, preset
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.trainer.gpus import GPUS, gpu, peak_of_device
from worldvln_edge.training.trainer.plan import (
    activation_bytes,
    adamw_bytes,
    block_parameters,
    parameter_count,
    parameter_tensors,
    plan_table,
    rank_memory,
    row_tokens,
    step_cost,
)
from worldvln_edge.world_model_flops import SequenceTokens, training_flops

MINI = preset("mini")


def _forward(model: WorldModel, tokens: SequenceTokens) -> torch.Tensor:
    """Loss of one row of `mini` with a dense mask and both heads."""
    config, visual = model.config, tokens.semantic + tokens.detail
    length = visual + tokens.text
    hidden = model.forward_training(
        torch.randn(1, visual, config.latent_channels),
        torch.randn(1, tokens.text, config.text_channels),
        torch.randn(2, length, config.head_dim // 2),
        torch.ones(length, length, dtype=torch.bool),
    )
    semantic = model.logits(hidden[:, : tokens.semantic], True)
    return semantic.square().sum() + model.logits(hidden[:, tokens.semantic :], False).square().sum()


@pytest.fixture(scope="module")
def row() -> SequenceTokens:
    """17 frames of `mini`, whose mask is dense on the CPU: every token meets every other."""
    found = row_tokens(MINI, frames=17)
    length = found.semantic + found.detail + found.text
    return SequenceTokens(semantic=found.semantic, detail=found.detail, text=found.text, pairs=length**2)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_parameters_are_those_of_the_model(name: str):
    config = preset(name).world_model
    with torch.device("meta"):
        model = WorldModel(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    assert parameter_tensors(config) == len(list(model.parameters()))
    assert block_parameters(config) == sum(p.numel() for p in next(iter(model.iterate_blocks())).parameters())


def test_optimiser_bytes_are_those_of_adamw():
    model = WorldModel(preset("nano").world_model)
    optimiser = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    held = sum(t.numel() * t.element_size() for state in optimiser.state.values() for t in state.values())
    config = model.config
    assert adamw_bytes(parameter_count(config), parameter_tensors(config)) == held
    alone = rank_memory(config, row_tokens(preset("nano"), frames=5), ranks=1, checkpointing=False, has_average=False)
    assert alone.optimiser == held


def test_flops_are_counted_within_two_percent(row: SequenceTokens):
    """Counted are what the formula leaves out too: nothing is differentiated with respect to latents and texts."""
    model = WorldModel(MINI.world_model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward(model, row).backward()
    assert training_flops(MINI.world_model, row) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_activations_are_kept_within_five_percent(row: SequenceTokens):
    model = WorldModel(MINI.world_model)
    length = row.semantic + row.detail + row.text
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_weight = tensor.ndim == 2 and tensor.shape[0] not in (length, row.semantic, row.detail)
        is_mask = tuple(tensor.shape[-2:]) == (length, length)
        if not isinstance(tensor, torch.nn.Parameter) and not is_weight and not is_mask:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        _forward(model, row)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert activation_bytes(MINI.world_model, row, checkpointing=False) == pytest.approx(held, rel=0.05)
    assert activation_bytes(MINI.world_model, row, checkpointing=True) < 0.3 * held


def test_tokens_and_pairs_are_those_of_the_mask():
    schedule = ScaleSchedule(MINI.schedule, 5)
    tokens = row_tokens(MINI, frames=17)
    assert tokens.semantic + tokens.detail == visual_tokens(schedule)
    sizes = [schedule.last_step(*key).tokens for key in all_scales(schedule)] + [tokens.text]
    size = torch.tensor(sizes)
    visible = document_matrix(schedule)[:-1, :-1]
    assert tokens.pairs == int((visible * size[:, None] * size[None]).sum())


def test_published_rows_have_the_published_tokens():
    released = preset("worldvln-8b")
    for frames, visual in ((1, 3904), (17, 19_520), (49, 50_752)):
        tokens = row_tokens(released, frames=frames)
        assert tokens.semantic + tokens.detail == visual


def test_memory_is_shared_and_time_is_that_of_the_busiest_gpu():
    released, h100 = preset("worldvln-8b"), gpu("h100")
    tokens = row_tokens(released, frames=17)
    one, eight = (
        rank_memory(released.world_model, tokens, ranks=ranks, checkpointing=True, has_average=True) for ranks in (1, 8)
    )
    assert one.parameters == 4 * parameter_count(released.world_model)
    assert eight.parameters == eight.gradients == eight.average == one.parameters // 8
    assert eight.activations == one.activations
    assert eight.total < 80e9 < one.total
    options = {"checkpointing": True, "mfu": 0.4}
    cost = step_cost(released.world_model, tokens, h100, ranks=8, micro_batches=9, **options)
    assert cost.seconds == pytest.approx(2 * training_flops(released.world_model, tokens) / (0.4 * 989e12))
    assert cost.flops > 9 * training_flops(released.world_model, tokens)


def test_table_says_what_fits():
    table = plan_table(
        preset("worldvln-8b"),
        "h100",
        gpu("h100"),
        frames=49,
        micro_rows=1,
        packed_tokens=20480,
        has_average=False,
        mfu=0.4,
    )
    lines = table.splitlines()
    assert "8,768,382,112 parameters; a row of 49 frames has 51,264 tokens" in lines[0]
    fits = {tuple(line.split()[:2]): line.split()[9] for line in lines[5:]}
    assert fits[("1", "yes")] == "no"
    assert fits[("8", "no")] == "no"
    assert fits[("8", "yes")] == fits[("64", "yes")] == "yes"


def test_rows_of_a_wrong_length_are_refused():
    with pytest.raises(ConfigError, match=r"rows must have 1 \+ 4\*k frames, found 16"):
        row_tokens(MINI, frames=16)


def test_unknown_gpus_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown GPU 'h1000'; choose one of .*h100"):
        gpu("h1000")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
    ],
)
def test_a_device_is_found_by_the_name_that_cuda_gives_it(device: str, name: str):
    assert peak_of_device(device) == GPUS[name].peak_flops


def test_a_device_that_is_not_listed_has_no_peak():
    assert peak_of_device("NVIDIA GeForce GTX 1080") is None
