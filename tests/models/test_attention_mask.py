"""Which token sees which in a training sequence: the published masks, and one rule for both kinds of mask."""

import json
import warnings

import numpy as np
import pytest
import torch
from small_models import tiny_config
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask, flex_attention

from worldvln_edge.config import ConfigError, ScheduleConfig
from worldvln_edge.models.attention_mask import (
    BLOCK,
    RowLayout,
    SequenceMask,
    all_scales,
    lay_out,
    visual_tokens,
)
from worldvln_edge.models.block_attention import block_attention
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.scale_schedule import ScaleSchedule

CONFIG = tiny_config()
MODEL = CONFIG.world_model


def schedule_of(frames: int, **changes) -> ScaleSchedule:
    settings = {"context_from_largest_no": 1, "context_interval": 1} | changes
    return ScaleSchedule(
        ScheduleConfig(
            scale_hw=((1, 1), (2, 2), (3, 3)),
            image_repetition=(1, 1, 1),
            video_repetition=(1, 1, 1),
            semantic_scales=2,
            frames_inner_clip=2,
            **settings,
        ),
        frames,
    )


def random_mask(tokens: int, documents: int, batch: int = 2) -> SequenceMask:
    """Any documents in any order, each seeing itself: no layout is as irregular."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.randint(0, documents, (batch, tokens // 37 + 1), generator=generator)
    visible = torch.rand(batch, documents, documents, generator=generator) < 0.3
    return SequenceMask(
        documents_BL=runs.repeat_interleave(37, 1)[:, :tokens], visible_BDD=visible | torch.eye(documents).bool()
    )


@pytest.mark.golden
@pytest.mark.parametrize("case", ["all", "pack", "sel"])
def test_masks_are_the_published_ones(golden, case: str):
    data = np.load(golden("training") / "attention_mask.npz")
    settings = json.loads((golden("training") / "config.json").read_text(encoding="utf-8"))["attention_mask"]
    a, b = (
        schedule_of(
            frames,
            context_from_largest_no=settings["pack" if case == "pack" else "all"]["context_from_largest_no"],
            context_interval=settings["pack"]["context_interval"],
        )
        for frames in (_frames(data["sched_A"]), _frames(data["sched_B"]))
    )
    for schedule, thw in ((a, data["sched_A"]), (b, data["sched_B"])):
        np.testing.assert_array_equal([schedule.last_step(*key).thw for key in all_scales(schedule)], thw)
    if case == "sel":
        rows = [RowLayout(a, int(data["text_lens_sel"][0]), [all_scales(a)[i] for i in data["sel_indices"]])]
    else:
        rows = [RowLayout(a, int(data["text_lens_all"][0])), RowLayout(b, int(data["text_lens_all"][1]))]
    layout = lay_out([rows], MODEL, pad_multiple=int(data["pad_multiple"]))
    np.testing.assert_array_equal(layout.mask.visible_BDD[0, :-1, :-1], data[f"{case}_doc"])
    np.testing.assert_array_equal(np.bincount(layout.mask.documents_BL[0]), data[f"{case}_lengths"])
    length, used = int(data[f"{case}_n"]), int(data[f"{case}_lengths"][:-1].sum())
    expected = np.unpackbits(data[f"{case}_token_mask"], axis=1, count=length).astype(bool)
    expected[used:, used:] = True  # padding sees itself, where the reference lets it see nothing
    np.testing.assert_array_equal(layout.mask.dense()[0, 0], expected)


def _frames(schedule_Nx3: np.ndarray) -> int:
    """Latent frames of a golden schedule of three scales a clip."""
    return int(schedule_Nx3[::3, 0].sum())


@pytest.mark.parametrize("mask", [random_mask(5 * BLOCK, 9), random_mask(300, 4)], ids=["whole tiles", "cut tile"])
def test_block_mask_and_dense_mask_say_the_same(mask: SequenceMask):
    """Token by token through the block mask's own rule, and tile by tile through its lists."""
    dense = mask.dense()
    blocks = mask.blocks()
    batch, length = mask.documents_BL.shape
    by_rule = create_mask(blocks.mask_mod, batch, 1, length, length, device="cpu")
    assert torch.equal(by_rule, dense)
    tiles = -(-length // BLOCK)
    padded = torch.nn.functional.pad(dense, (0, tiles * BLOCK - length) * 2)
    by_tile = padded.unflatten(2, (tiles, BLOCK)).unflatten(4, (tiles, BLOCK))
    for b in range(batch):
        for q in range(tiles):
            partial = set(blocks.kv_indices[b, 0, q, : blocks.kv_num_blocks[b, 0, q]].tolist())
            full = set(blocks.full_kv_indices[b, 0, q, : blocks.full_kv_num_blocks[b, 0, q]].tolist())
            whole = [k for k in range(length // BLOCK) if q < length // BLOCK and by_tile[b, 0, q, :, k].all()]
            assert full == set(whole)
            assert {k for k in range(tiles) if by_tile[b, 0, q, :, k].any()} <= partial | full
            assert not partial & full
            if length % BLOCK == 0:  # no tile is worked on in vain
                assert all(by_tile[b, 0, q, :, k].any() for k in partial)


def test_attention_in_blocks_equals_dense_attention():
    layout = lay_out(
        [[RowLayout(schedule_of(7), 3), RowLayout(schedule_of(3), 5)], [RowLayout(schedule_of(5), 2)]], MODEL
    )
    generator = torch.Generator().manual_seed(1)
    length = layout.mask.documents_BL.shape[1]
    q = torch.randn(2, 4, length, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, length, 8, generator=generator)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, layout.mask.dense(), enable_gqa=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that the CPU's way is not compiled
        torch.testing.assert_close(block_attention(q, k, v, layout.mask.blocks()), expected)


def test_the_world_model_takes_either_mask():
    torch.manual_seed(0)
    model = WorldModel(MODEL).requires_grad_(False)
    layout = lay_out([[RowLayout(ScaleSchedule(CONFIG.schedule, 5), 4)]], MODEL)
    latents = torch.randn(1, layout.visual, MODEL.latent_channels)
    text = torch.randn(1, layout.text, MODEL.text_channels)
    dense = model(latents, text, layout.rope_B2Ln, layout.mask.dense())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(latents, text, layout.rope_B2Ln, layout.mask.blocks()), dense)


@pytest.mark.gpu
def test_compiled_attention_in_blocks_equals_dense_attention_with_gradients():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for rows in ([7, 3], [7, 7, 5], [3]):  # one kernel serves several lengths
        layout = lay_out([[RowLayout(schedule_of(frames), 3) for frames in rows]], MODEL)
        mask = layout.mask.to(torch.device("cuda"))
        length = mask.documents_BL.shape[1]
        generator = torch.Generator("cuda").manual_seed(1)
        q = torch.randn(1, 4, length, 64, generator=generator, device="cuda", requires_grad=True)
        k = torch.randn(1, 2, length, 64, generator=generator, device="cuda", requires_grad=True)
        v = torch.randn(1, 2, length, 64, generator=generator, device="cuda", requires_grad=True)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.dense(), enable_gqa=True)
        expected = torch.autograd.grad(dense.square().sum(), (q, k, v))
        blocks = block_attention(q, k, v, mask.blocks())
        torch.testing.assert_close(blocks, dense, atol=2e-3, rtol=1e-3)
        for ours, theirs in zip(torch.autograd.grad(blocks.square().sum(), (q, k, v)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


def test_no_token_sees_nothing_and_padding_is_seen_by_padding_only():
    layout = lay_out([[RowLayout(schedule_of(5), 5)], [RowLayout(schedule_of(3), 0)]], MODEL)
    mask = layout.mask.dense()
    assert mask.any(-1).all()
    padding = layout.mask.documents_BL == layout.mask.visible_BDD.shape[-1] - 1
    assert torch.equal(mask[:, 0] & padding[:, None, :], padding[:, :, None] & padding[:, None, :])


def test_rows_of_a_sequence_never_see_each_other():
    rows = [RowLayout(schedule_of(7), 3), RowLayout(schedule_of(3), 5), RowLayout(schedule_of(7), 3)]
    layout = lay_out([rows], MODEL)
    owner = torch.full((layout.mask.documents_BL.shape[1],), -1)
    for index, row in enumerate(rows):
        first, text = layout.visual_starts[index][1], layout.visual + layout.text_starts[index][1]
        owner[first : first + row.visual_tokens] = index
        owner[text : text + row.text_tokens] = index
    seen = layout.mask.dense()[0, 0]
    assert not seen[owner[:, None] != owner[None, :]].any()


def test_a_row_stands_alike_alone_and_packed():
    """Rotations and visibility of a row do not depend on its neighbours."""
    row = RowLayout(schedule_of(5), 4, real_scale_ids=range(9))
    alone = lay_out([[row]], MODEL)
    packed = lay_out([[RowLayout(schedule_of(7), 3), row]], MODEL)
    first, text = packed.visual_starts[1][1], packed.visual + packed.text_starts[1][1]
    places = torch.cat((torch.arange(row.visual_tokens) + first, torch.arange(4) + text))
    own = torch.arange(row.visual_tokens + 4)
    assert torch.equal(packed.rope_B2Ln[0, :, places], alone.rope_B2Ln[0, :, own])
    inside = packed.mask.dense()[0, 0][places[:, None], places[None, :]]
    assert torch.equal(inside, alone.mask.dense()[0, 0][own[:, None], own[None, :]])


def test_lengths_are_multiples_of_the_tile():
    assert lay_out([[RowLayout(schedule_of(3), 5)]], MODEL).mask.documents_BL.shape[1] == BLOCK
    layout = lay_out([[RowLayout(schedule_of(3), 5)]], MODEL, pad_multiple=16)
    assert layout.mask.documents_BL.shape[1] == 48  # 14 + 28 + 5 = 47


def test_visible_pairs_are_those_of_the_mask_without_padding():
    layout = lay_out(
        [[RowLayout(schedule_of(7), 3), RowLayout(schedule_of(3), 5)], [RowLayout(schedule_of(5), 2)]], MODEL
    )
    padding = layout.mask.documents_BL == layout.mask.visible_BDD.shape[-1] - 1
    dense = layout.mask.dense()[:, 0] & ~padding[:, :, None]
    assert layout.mask.visible_pairs() == int(dense.sum())


def test_subsets_keep_the_positions_of_the_full_schedule():
    schedule = schedule_of(5)
    keys = [(0, 2), (1, 0), (1, 1)]
    part = lay_out([[RowLayout(schedule, 2, keys)]], MODEL).rope_B2Ln
    full = lay_out([[RowLayout(schedule, 2)]], MODEL).rope_B2Ln
    first = visual_tokens(schedule, [(0, 0), (0, 1)])
    used = visual_tokens(schedule, keys)
    assert torch.equal(part[0, :, :used], full[0, :, first : first + used])


def test_rows_that_do_not_fit_their_schedule_are_refused():
    schedule = schedule_of(5)
    with pytest.raises(ConfigError, match="in its order"):
        RowLayout(schedule, 5, [(1, 0), (0, 0)])
    with pytest.raises(ConfigError, match=r"one real scale id per scale \(9\), found 2"):
        RowLayout(schedule, 5, real_scale_ids=[0, 1])
    with pytest.raises(ConfigError, match="real scale id 5 is no repetition of clip 0 scale 0"):
        RowLayout(schedule, 2, real_scale_ids=[5, *range(1, 9)])


@pytest.mark.slow
def test_masks_of_all_lengths_are_traced_as_one():
    """Every step has another mask; a compiler that began anew each time would give up after a few."""
    tracer = CompileCounter()
    attend = torch.compile(flex_attention, dynamic=True, backend=tracer)
    for copies in range(1, 12):
        rows = [RowLayout(schedule_of(frames), 3) for frames in (7, 3, 5) for _ in range(copies)]
        layout = lay_out([rows], MODEL)
        q = torch.zeros(1, 4, layout.mask.documents_BL.shape[1], 16)
        attend(q, q[:, :2], q[:, :2], block_mask=layout.mask.blocks(), enable_gqa=True)
    assert tracer.frame_count <= 3


def test_flex_attention_on_the_cpu_has_no_backward():
    """Why training on the CPU takes the dense mask; once this fails, one mask serves everywhere."""
    q = torch.zeros(1, 1, BLOCK, 8, requires_grad=True)
    with pytest.raises(NotImplementedError):
        flex_attention(q, q, q)
