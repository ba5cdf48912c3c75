"""Packing: every row once, within the budget, the same for the same seed and epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.training.data.packing import WINDOW_ROWS, pack_rows
from worldvln_edge.training.trainer.stage import epoch_order

LENGTHS = st.lists(st.integers(1, 150), min_size=1, max_size=60)


@given(LENGTHS, st.integers(0, 5), st.integers(0, 5))
def test_every_row_comes_once_and_fits(lengths: list[int], seed: int, epoch: int):
    sequences = pack_rows(lengths, budget=100, seed=seed, epoch=epoch)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    for rows in sequences:
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= 100


@given(LENGTHS)
def test_a_row_is_put_where_it_fits_first(lengths: list[int]):
    """No row of a later sequence would have fitted into an earlier one before it came."""
    sequences = pack_rows(lengths, budget=100, seed=1, epoch=0)
    place = {row: position for position, row in enumerate(epoch_order(1, 0, len(lengths)))}
    for i, rows in enumerate(sequences):
        for earlier in sequences[:i]:
            for row in rows:
                taken = sum(lengths[other] for other in earlier if place[other] < place[row])
                assert taken + lengths[row] > 100


def test_order_belongs_to_seed_and_epoch():
    lengths = [30, 40, 50, 60, 70] * 20

    def packed(seed: int, epoch: int) -> list[list[int]]:
        return pack_rows(lengths, budget=100, seed=seed, epoch=epoch)

    assert packed(0, 0) == packed(0, 0)
    assert packed(0, 0) != packed(0, 1)
    assert packed(0, 0) != packed(1, 0)


def test_sequences_do_not_reach_beyond_their_window():
    rows = 2 * WINDOW_ROWS + 10
    place = {row: at // WINDOW_ROWS for at, row in enumerate(epoch_order(0, 0, rows))}
    sequences = pack_rows([30] * rows, budget=100, seed=0, epoch=0)
    windows = [{place[row] for row in sequence} for sequence in sequences]
    assert all(len(window) == 1 for window in windows)
    assert [min(window) for window in windows] == sorted(min(window) for window in windows)
    assert {len(sequence) for sequence in sequences} == {1, 3}  # three fit, one is left over at a window's end


@pytest.mark.parametrize(("lengths", "budget"), [([1, 0], 5), ([1], 0)])
def test_lengths_and_budget_are_checked(lengths: list[int], budget: int):
    with pytest.raises(ValueError, match="budget and lengths must be >= 1"):
        pack_rows(lengths, budget=budget, seed=0, epoch=0)


def test_no_rows_are_no_sequences():
    assert pack_rows([], budget=10, seed=0, epoch=0) == []
