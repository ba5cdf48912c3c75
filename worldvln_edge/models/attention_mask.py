"""A training sequence: which token sees which, and where each token stands.

Sequence of a row: its visual scales in schedule order, then its text, then padding. Each scale, the text and the
padding are documents; visibility is a small matrix between documents, widened to tokens.
Legend: B rows, V visual tokens, X longest text, L length, D documents, n = head_dim/2.
Source: spec/training.md 2.3, 2.4, 2.5; spec/world_model.md 2.5, 2.7.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldvln_edge.config import ConfigError, WorldModelConfig
from worldvln_edge.rope import text_rope, visual_rope
from worldvln_edge.scale_schedule import ScaleSchedule

ScaleKey = tuple[int, int]
"""(clip, scale inside the clip)."""


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


def document_ids(
    schedule: ScaleSchedule, text_tokens_B: Sequence[int], length: int, scales: Sequence[ScaleKey] | None = None
) -> Tensor:
    """Document of every token: int64 [B, L]. Tokens behind a row's text are padding.

    Raises:
        ConfigError: the longest row does not fit into `length`.
    """
    keys = _checked(schedule, scales)
    sizes = [schedule.last_step(*key).tokens for key in keys]
    visual, longest = sum(sizes), max(text_tokens_B)
    if visual + longest > length:
        raise ConfigError(f"a row of {visual} visual and {longest} text tokens does not fit into length {length}")
    ids = torch.full((len(text_tokens_B), length), len(keys) + 1)
    ids[:, :visual] = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(sizes, dtype=torch.int64))
    for row, tokens in enumerate(text_tokens_B):
        ids[row, visual : visual + tokens] = len(keys)
    return ids


def training_mask(
    schedule: ScaleSchedule, text_tokens_B: Sequence[int], length: int, scales: Sequence[ScaleKey] | None = None
) -> Tensor:
    """Token mask of a batch of rows with one schedule: bool [B, 1, L, L], True where row token sees column token.

    Args:
        schedule: schedule of every row.
        text_tokens_B: text length of every row.
        length: L, at least visual tokens + longest text.
        scales: subset of scales in schedule order (2.5); None means all.
    """
    ids = document_ids(schedule, text_tokens_B, length, scales)
    matrix = document_matrix(schedule, scales)
    return matrix[ids[:, :, None], ids[:, None, :]].unsqueeze(1)


def training_rope(
    schedule: ScaleSchedule,
    real_scale_ids: Sequence[int],
    text_tokens: int,
    length: int,
    config: WorldModelConfig,
    scales: Sequence[ScaleKey] | None = None,
) -> Tensor:
    """Cos and sin of one row: float32 [2, L, n]; padding is zero. Stack rows whose repetitions differ.

    Args:
        schedule: full schedule of the row (positions stay those of the full schedule, also for a subset).
        real_scale_ids: real scale id of the chosen repetition, one per scale of `scales`.
        text_tokens: text positions to fill; the longest of the batch.
        length: L.
        config: head size and text length limit.
        scales: as in `training_mask`.

    Raises:
        ConfigError: an id does not belong to its scale, or the row does not fit into `length`.
    """
    keys = _checked(schedule, scales)
    if len(real_scale_ids) != len(keys):
        raise ConfigError(f"rope needs one real scale id per scale ({len(keys)}), found {len(real_scale_ids)}")
    tables = []
    for (clip, scale), real_scale_id in zip(keys, real_scale_ids, strict=True):
        steps = {s.real_scale_id: s for s in schedule.clips[clip].steps if s.scale == scale}
        if int(real_scale_id) not in steps:
            raise ConfigError(
                f"real scale id {int(real_scale_id)} is no repetition of clip {clip} scale {scale} "
                f"(those are {sorted(steps)})"
            )
        first_frame = schedule.clips[clip].first_frame
        step = steps[int(real_scale_id)]
        tables.append(
            visual_rope(step, first_frame, schedule.config.latent_hw, config.text_max_tokens, config.head_dim)
        )
    tables.append(text_rope(text_tokens, config.head_dim))
    table = torch.from_numpy(np.concatenate(tables, 1))
    if table.shape[1] > length:
        raise ConfigError(f"a row of {table.shape[1]} tokens does not fit into length {length}")
    return torch.nn.functional.pad(table, (0, 0, 0, length - table.shape[1]))


def _checked(schedule: ScaleSchedule, scales: Sequence[ScaleKey] | None) -> list[ScaleKey]:
    every = all_scales(schedule)
    if scales is None:
        return every
    keys = list(scales)
    if keys != [key for key in every if key in set(keys)]:
        raise ConfigError(f"scales must be distinct (clip, scale) pairs of the schedule in its order, found {keys}")
    return keys
