"""Packing is a partition that keeps to the budget: of sequences, and of temporal groups."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qvl_batch.model.packing import Piece, chunk, halves, pack

GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)))


@given(st.lists(st.integers(1, 500)), st.integers(1, 600))
def test_every_sequence_once_in_order_within_the_budget(lengths, budget):
    packs = pack(lengths, budget)
    assert [index for chosen in packs for index in chosen] == list(range(len(lengths)))
    for chosen in packs:
        assert chosen
        assert len(chosen) == 1 or sum(lengths[i] for i in chosen) <= budget
    for before, after in itertools.pairwise(packs):
        # Nothing that would still have fitted is put off.
        assert sum(lengths[i] for i in before) + lengths[after[0]] > budget


def groups_of(pieces):
    return [(piece.index, group) for piece in pieces for group in range(piece.first, piece.last)]


@given(GRIDS, st.integers(1, 60))
def test_every_temporal_group_once_in_order_within_the_budget(grids, budget):
    chunks = chunk(grids, budget)
    expected = [(i, group) for i, grid in enumerate(grids) for group in range(grid[0])]
    assert groups_of(itertools.chain.from_iterable(chunks)) == expected
    sizes = [rows * columns for _, rows, columns in grids]
    used = [
        sum((piece.last - piece.first) * sizes[piece.index] for piece in pieces)
        for pieces in chunks
    ]
    for total, pieces in zip(used, chunks, strict=True):
        assert total <= budget or len(groups_of(pieces)) == 1
    for total, following in zip(used, chunks[1:], strict=False):
        assert total + sizes[following[0].index] > budget


@given(GRIDS.filter(bool), st.integers(1, 200))
def test_halves_split_down_to_single_groups(grids, budget):
    for pieces in chunk(grids, budget):
        parts = halves(pieces)
        if len(groups_of(pieces)) == 1:
            assert parts is None
        else:
            assert all(parts)
            assert groups_of(parts[0]) + groups_of(parts[1]) == groups_of(pieces)


def test_a_video_is_split_between_its_groups():
    assert chunk([(1, 2, 2), (5, 2, 3)], 16) == [
        [Piece(0, 0, 1), Piece(1, 0, 2)],
        [Piece(1, 2, 4)],
        [Piece(1, 4, 5)],
    ]
