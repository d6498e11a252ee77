"""Packing is a partition of the sequences that keeps to the budget."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qvl_batch.model.packing import pack


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
