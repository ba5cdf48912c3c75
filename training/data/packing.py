"""Which rows go into one sequence: first fit over a shuffled window, every row exactly once an epoch.

Source: spec/training.md 1.5 (Product).
"""

from __future__ import annotations

from collections.abc import Sequence

from worldvln_edge.training.trainer.stage import epoch_order

WINDOW_ROWS = 1000
"""Rows that are packed against each other; a packed sequence never reaches beyond its window."""


def pack_rows(lengths: Sequence[int], *, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Pack rows into sequences.

    A row goes into the first sequence of its window that has room for it. A row that is longer than the budget is
    alone in its sequence; what of it is trained is the business of whoever reads it.

    Args:
        lengths: tokens of every row.
        budget: most tokens of a sequence.
        seed, epoch: of the order; equal ones give equal sequences.

    Returns:
        Sequences in the order of training, each the indices of its rows.

    Raises:
        ValueError: a budget or a length below 1.
    """
    if budget < 1 or any(length < 1 for length in lengths):
        raise ValueError(f"budget and lengths must be >= 1, found {budget} and {min(lengths, default=1)}")
    order = epoch_order(seed, epoch, len(lengths))
    sequences: list[list[int]] = []
    for first in range(0, len(order), WINDOW_ROWS):
        sequences += _first_fit(order[first : first + WINDOW_ROWS], lengths, budget)
    return sequences


def _first_fit(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        length = lengths[row]
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            sequences.append([row])
            room.append(budget - length)
        else:
            sequences[place].append(row)
            room[place] -= length
    return sequences
