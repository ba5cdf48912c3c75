"""Training sequences: which token sees which, and where each token stands.

A sequence holds one or more rows: first the visual scales of all rows, then the texts of all rows, then padding. Each
scale of a row, each text and the padding are documents; visibility is a small matrix between documents. The dense
mask and the block mask widen that one matrix to tokens.
Sequences of one batch may hold different rows; padding then also stands between visual tokens and texts.
Legend: B sequences, V most visual tokens of a sequence, X most text tokens, L length, D documents, n = head_dim/2.
Source: spec/training.md 2.3, 2.4, 2.5; spec/world_model.md 2.5, 2.7.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from worldvln_edge.config import ConfigError, WorldModelConfig
from worldvln_edge.rope import text_rope, visual_rope
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep

ScaleKey = tuple[int, int]
"""(clip, scale inside the clip)."""
BLOCK = 128
"""Tokens along one side of a tile of the block mask; sequences are padded to a multiple of it (2.3)."""


def all_scales(schedule: ScaleSchedule) -> list[ScaleKey]:
    """Every scale of a schedule in order."""
    return [(clip.index, scale) for clip in schedule.clips for scale in range(schedule.config.scales_per_clip)]


def visual_tokens(schedule: ScaleSchedule, scales: Sequence[ScaleKey] | None = None) -> int:
    """Visual tokens of the given scales (all by default)."""
    return sum(schedule.last_step(*key).tokens for key in _checked(schedule, scales))


def document_matrix(schedule: ScaleSchedule, scales: Sequence[ScaleKey] | None = None) -> Tensor:
    """Visibility between the documents of one row: bool [D, D], row = query, D = scales + 2 (text, padding).

    A scale sees itself, the text, and those of its references that are among `scales`; text sees itself; padding
    sees itself, so that no row of a softmax is empty.
    """
    keys = _checked(schedule, scales)
    position = {key: index for index, key in enumerate(keys)}
    text = len(keys)
    matrix = torch.eye(text + 2, dtype=torch.bool)
    for index, key in enumerate(keys):
        matrix[index, text] = True
        for reference in schedule.references_of_scale(*key):
            if reference in position:
                matrix[index, position[reference]] = True
    return matrix


class RowLayout:
    """One row of a training sequence.

    Args:
        schedule: full schedule of the row; positions stay those of the full schedule, also for a subset of scales.
        text_tokens: tokens of its text.
        scales: subset of scales in schedule order (2.5); None means all.
        real_scale_ids: real scale id of the chosen repetition of every scale of `scales`; None: the last repetitions.

    Raises:
        ConfigError: scales out of order or not of the schedule, or an id that does not belong to its scale.
    """

    def __init__(
        self,
        schedule: ScaleSchedule,
        text_tokens: int,
        scales: Sequence[ScaleKey] | None = None,
        real_scale_ids: Sequence[int] | None = None,
    ):
        self.schedule = schedule
        self.text_tokens = text_tokens
        self.scales = tuple(_checked(schedule, scales))
        last = [schedule.last_step(*key) for key in self.scales]
        self.scale_tokens = tuple(step.tokens for step in last)
        ids = [step.real_scale_id for step in last] if real_scale_ids is None else [int(i) for i in real_scale_ids]
        if len(ids) != len(last):
            raise ConfigError(f"a row needs one real scale id per scale ({len(last)}), found {len(ids)}")
        self.steps = tuple(
            _repetition(schedule, key, real_scale_id) for key, real_scale_id in zip(self.scales, ids, strict=True)
        )

    @property
    def visual_tokens(self) -> int:
        return sum(self.scale_tokens)


@dataclass(frozen=True, kw_only=True)
class SequenceMask:
    """Visibility of a batch of sequences, as documents."""

    documents_BL: Tensor
    """int64: document of every token; the last document is the padding."""
    visible_BDD: Tensor
    """bool: row document sees column document."""

    def to(self, device: torch.device) -> "SequenceMask":
        return SequenceMask(documents_BL=self.documents_BL.to(device), visible_BDD=self.visible_BDD.to(device))

    def dense(self) -> Tensor:
        """Token mask: bool [B, 1, L, L], True where the row token sees the column token."""
        batch, length = self.documents_BL.shape
        device = self.documents_BL.device
        token = torch.arange(length, device=device)
        row = torch.arange(batch, device=device)[:, None, None, None]
        return self._rule()(row, torch.zeros_like(row), token[:, None], token[None, :])

    def blocks(self) -> BlockMask:
        """The same visibility for `flex_attention`: tiles of which no, some or all pairs of tokens are visible.

        Found from the documents of each tile, so that no [L, L] mask is ever built.
        """
        batch, length = self.documents_BL.shape
        tiles = -(-length // BLOCK)
        padding = self.visible_BDD.shape[-1] - 1
        documents = torch.nn.functional.pad(self.documents_BL, (0, tiles * BLOCK - length), value=padding)
        # Numbers of visible pairs of documents. Only whether one is 0 matters, which no precision changes.
        present_BTD = torch.zeros(batch, tiles, self.visible_BDD.shape[-1], device=documents.device)
        present_BTD.scatter_(2, documents.view(batch, tiles, BLOCK), 1.0)
        some = present_BTD @ self.visible_BDD.float() @ present_BTD.mT > 0.5
        every = present_BTD @ (~self.visible_BDD).float() @ present_BTD.mT < 0.5
        partial_count, partial = _tile_lists(some & ~every)
        full_count, full = _tile_lists(every)
        return BlockMask.from_kv_blocks(
            partial_count,
            partial,
            full_count,
            full,
            BLOCK_SIZE=BLOCK,
            mask_mod=self._rule(),
            seq_lengths=(length, length),
        )

    def visible_pairs(self) -> int:
        """Pairs of (query, key) tokens that attention works on, padding left out."""
        tokens_BD = self.visible_BDD.new_zeros(self.visible_BDD.shape[:2], dtype=torch.float64)
        tokens_BD.scatter_add_(1, self.documents_BL, torch.ones_like(self.documents_BL, dtype=torch.float64))
        tokens_BD, visible = tokens_BD[:, :-1], self.visible_BDD[:, :-1, :-1].double()
        return int(torch.einsum("bq,bqk,bk->", tokens_BD, visible, tokens_BD))

    def _rule(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        documents_BL, visible_BDD = self.documents_BL, self.visible_BDD

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible_BDD[row, documents_BL[row, query], documents_BL[row, key]]

        return sees


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Places of all tokens of a batch of sequences.

    Row r is the r-th over all sequences. Visual token v of sequence b stands at [b, v], text token x at [b, V + x].
    """

    mask: SequenceMask
    rope_B2Ln: Tensor
    """float32 cos and sin; zero for padding."""
    visual: int
    """V."""
    text: int
    """X."""
    visual_starts: tuple[tuple[int, int], ...]
    """Of every row: its sequence and the place of its first visual token among the V."""
    text_starts: tuple[tuple[int, int], ...]
    """Of every row: its sequence and the place of its first text token among the X."""


def lay_out(
    sequences: Sequence[Sequence[RowLayout]], config: WorldModelConfig, *, pad_multiple: int = BLOCK
) -> SequenceLayout:
    """Place the rows of every sequence: scales of all rows, texts of all rows, padding.

    Args:
        sequences: rows of every sequence; at least one row each.
        config: head size and text length limit, for the rotations.
        pad_multiple: L is the next multiple of it.
    """
    visual = max(sum(row.visual_tokens for row in rows) for rows in sequences)
    text = max(sum(row.text_tokens for row in rows) for rows in sequences)
    length = -(-(visual + text) // pad_multiple) * pad_multiple
    documents = max(sum(len(row.scales) + 1 for row in rows) for rows in sequences) + 1
    ids_BL = torch.full((len(sequences), length), documents - 1)
    visible_BDD = torch.zeros(len(sequences), documents, documents, dtype=torch.bool)
    visible_BDD[:, -1, -1] = True
    rope_B2Ln = torch.zeros(len(sequences), 2, length, config.head_dim // 2)
    rotations = _Rotations(config, text)
    matrices: dict[tuple[object, ...], Tensor] = {}
    visual_starts, text_starts = [], []
    for b, rows in enumerate(sequences):
        token, first = 0, 0
        first_text = sum(len(row.scales) for row in rows)
        text_token = visual
        for index, row in enumerate(rows):
            visual_starts.append((b, token))
            text_starts.append((b, text_token - visual))
            own = torch.tensor([*range(first, first + len(row.scales)), first_text + index])
            alike = (row.schedule.config, row.schedule.latent_frames, row.scales)
            if alike not in matrices:
                matrices[alike] = document_matrix(row.schedule, row.scales)[:-1, :-1]
            visible_BDD[b, own[:, None], own[None, :]] = matrices[alike]
            sizes = torch.tensor(row.scale_tokens)
            ids_BL[b, token : token + row.visual_tokens] = torch.repeat_interleave(own[:-1], sizes)
            ids_BL[b, text_token : text_token + row.text_tokens] = own[-1]
            rope_B2Ln[b, :, token : token + row.visual_tokens] = rotations.visual(row)
            rope_B2Ln[b, :, text_token : text_token + row.text_tokens] = rotations.text[:, : row.text_tokens]
            token, text_token, first = token + row.visual_tokens, text_token + row.text_tokens, first + len(row.scales)
    return SequenceLayout(
        mask=SequenceMask(documents_BL=ids_BL, visible_BDD=visible_BDD),
        rope_B2Ln=rope_B2Ln,
        visual=visual,
        text=text,
        visual_starts=tuple(visual_starts),
        text_starts=tuple(text_starts),
    )


class _Rotations:
    """Rotation tables of the rows of one batch; rows that stand alike share one."""

    def __init__(self, config: WorldModelConfig, text_tokens: int):
        self.text = torch.from_numpy(text_rope(text_tokens, config.head_dim))
        self._config = config
        self._visual: dict[tuple[object, ...], Tensor] = {}

    def visual(self, row: RowLayout) -> Tensor:
        """float32 [2, visual tokens of the row, n]."""
        # A step names its clip and frames; the first frame of a clip and the grid follow from the schedule's config.
        key = (row.schedule.config, row.steps)
        if key not in self._visual:
            hw, limit, head_dim = row.schedule.config.latent_hw, self._config.text_max_tokens, self._config.head_dim
            first = [clip.first_frame for clip in row.schedule.clips]
            tables = [visual_rope(step, first[step.clip], hw, limit, head_dim) for step in row.steps]
            self._visual[key] = torch.from_numpy(np.concatenate(tables, 1))
        return self._visual[key]


def _repetition(schedule: ScaleSchedule, key: ScaleKey, real_scale_id: int) -> ScaleStep:
    clip, scale = key
    steps = {step.real_scale_id: step for step in schedule.clips[clip].steps if step.scale == scale}
    if real_scale_id not in steps:
        raise ConfigError(
            f"real scale id {real_scale_id} is no repetition of clip {clip} scale {scale} (those are {sorted(steps)})"
        )
    return steps[real_scale_id]


def _tile_lists(tiles_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Number of marked tiles of every query tile [B, 1, Q] and their key indices, marked ones first [B, 1, Q, K]."""
    order = torch.argsort(tiles_BQK.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles_BQK.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def _checked(schedule: ScaleSchedule, scales: Sequence[ScaleKey] | None) -> list[ScaleKey]:
    every = all_scales(schedule)
    if scales is None:
        return every
    keys = list(scales)
    if keys != [key for key in every if key in set(keys)]:
        raise ConfigError(f"scales must be distinct (clip, scale) pairs of the schedule in its order, found {keys}")
    return keys
