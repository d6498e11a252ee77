"""M-RoPE positions against transformers' own."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLConfig, Qwen3VLModel

from qvl_batch.model.positions import mrope_positions
from qvl_batch.model.prompt import Span

PARTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)), max_size=5)


@settings(max_examples=150, deadline=None)
@given(PARTS, st.integers(1, 9))
def test_equals_transformers(parts, tail):
    spans, grids, token_types = [], [], []
    for text, rows, columns in parts:
        token_types += [0] * text
        spans.append(Span(len(token_types), rows, columns))
        grids.append([1, 2 * rows, 2 * columns])
        token_types += [1] * (rows * columns)
    token_types += [0] * tail
    types = torch.tensor([token_types])
    # Only its arithmetic is used, so the model needs no weights.
    model = Qwen3VLModel.__new__(Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen3VLConfig()
    theirs, _ = model.get_rope_index(
        torch.zeros_like(types), types, torch.tensor(grids) if grids else None
    )
    ours = mrope_positions(len(token_types), spans)
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


def test_text_alone_counts_on():
    np.testing.assert_array_equal(mrope_positions(4, []), [[0, 1, 2, 3]] * 3)


def test_text_goes_on_behind_the_larger_side():
    positions = mrope_positions(9, [Span(2, 2, 3)])
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 2, 2, 2, 2, 2, 5])
    np.testing.assert_array_equal(positions[1], [0, 1, 2, 2, 2, 3, 3, 3, 5])
    np.testing.assert_array_equal(positions[2], [0, 1, 2, 3, 4, 2, 3, 4, 5])
