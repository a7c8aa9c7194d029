"""How steps are cut: the same number of forward passes on every rank where SyncBN needs it, and no
micro batch of one row where the model cannot take it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.stream import StepSlice, StreamPlan, deal
from raypipe.train.cut import Cut, n_pieces
from raypipe.train.feed import Micro, in_pieces, micro_batches

WORLDS = st.integers(1, 5)
ROWS = st.integers(1, 60)
SIZES = st.integers(1, 9)


def step(global_rows: int, rank: int, world: int) -> Iterator[StepSlice]:
    yield StepSlice(0, 0, global_rows, np.arange(global_rows)[deal(global_rows, rank, world)])


def forwards(cut: Cut, global_rows: int, rank: int, limit: int) -> list[Micro]:
    """What a rank computes, one after the other."""
    found = []
    for micro in micro_batches(step(global_rows, rank, cut.world), cut, idle_row=0):
        batch = {"x": torch.zeros(len(micro.rows))}
        found += [part for part, _ in in_pieces(micro, batch, limit, cut.least)]
    return found


def fits(cut: Cut, n: int, rows_per_step: int) -> bool:
    try:
        cut.check(StreamPlan(np.arange(n), 0, rows_per_step, 1))
    except ConfigError:
        return False
    return True


@given(world=WORLDS, global_rows=ROWS, batch_size=SIZES, limit=SIZES)
def test_in_step_all_ranks_make_as_many_forwards(
    world: int, global_rows: int, batch_size: int, limit: int
) -> None:
    cut = Cut(batch_size=batch_size, world=world, in_step=True)
    if not fits(cut, global_rows, global_rows):
        return
    ranks = [forwards(cut, global_rows, rank, limit) for rank in range(world)]
    assert len({len(found) for found in ranks}) == 1
    assert all(part.counted == len(part.rows) >= 1 for found in ranks for part in found)
    assert [part.last for part in ranks[0]] == [False] * (len(ranks[0]) - 1) + [True]
    rows = [row for found in ranks for part in found for row in part.rows]
    assert sorted(rows) == list(range(global_rows))
    most = max(len(part.rows) for found in ranks for part in found)
    assert most <= max(min(batch_size, limit), 2 if min(batch_size, limit) == 1 else 0)


@given(world=WORLDS, global_rows=ROWS, batch_size=SIZES)
def test_only_a_rank_without_a_row_of_its_own_is_refused(
    world: int, global_rows: int, batch_size: int
) -> None:
    """By counting: every rank's rows against the passes of the one that has the most."""
    shares = [len(range(global_rows)[deal(global_rows, r, world)]) for r in range(world)]
    passes = -(-max(shares) // batch_size)
    cut = Cut(batch_size=batch_size, world=world, in_step=True)
    assert fits(cut, global_rows, global_rows) == (min(shares) >= passes)


def test_without_syncbn_each_rank_counts_for_itself() -> None:
    """5 rows over two ranks at 2: two forwards and one, which would leave SyncBN waiting."""
    alone, in_step = (Cut(batch_size=2, world=2, in_step=flag) for flag in (False, True))
    counts = [[len(forwards(cut, 5, rank, 2)) for rank in (0, 1)] for cut in (alone, in_step)]
    assert counts == [[2, 1], [2, 2]]


@given(world=WORLDS, global_rows=ROWS, batch_size=st.integers(1, 9), limit=SIZES)
def test_no_row_is_alone_where_two_are_needed(
    world: int, global_rows: int, batch_size: int, limit: int
) -> None:
    cut = Cut(batch_size=batch_size, world=world, least=2)
    sizes = [
        [len(micro.rows) for micro in micro_batches(step(global_rows, r, world), cut, 0)]
        for r in range(world)
    ]
    assert fits(cut, global_rows, global_rows) == (min(min(s) for s in sizes) >= 2)
    if fits(cut, global_rows, global_rows):
        found = [part for r in range(world) for part in forwards(cut, global_rows, r, limit)]
        assert min(len(part.rows) for part in found) >= 2
        assert max(len(part.rows) for part in found) <= max(limit, 3)
        assert sum(part.counted for part in found) == global_rows


@given(n=ROWS, limit=SIZES)
def test_without_a_need_the_limit_is_kept(n: int, limit: int) -> None:
    assert n_pieces(n, limit) == -(-n // limit)


@pytest.mark.parametrize(
    ("n", "rows_per_step", "cut", "words"),
    [
        (9, 8, Cut(batch_size=8, least=2), "a step of 1 rows over 1 workers has a micro batch"),
        (9, 3, Cut(batch_size=2, least=2), "batch_size=2: a step of 3 rows"),
        (7, 4, Cut(batch_size=2, world=2, least=2), "a step of 3 rows over 2 workers"),
        (9, 8, Cut(batch_size=4, world=2, in_step=True), "leaves worker 1 of 2 without a row"),
        (11, 8, Cut(batch_size=1, world=2, in_step=True), "a step of 3 rows leaves worker 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(n: int, rows_per_step: int, cut: Cut, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cut.check(StreamPlan(np.arange(n), 0, rows_per_step, 1))
