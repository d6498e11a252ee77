"""M-RoPE positions of one prompt: pure arithmetic on its vision spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qvl_batch.model.prompt import Span


def mrope_positions(num_tokens: int, spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Return the (time, height, width) position of every token, int64 of shape (3, num_tokens).

    Source: ``get_rope_index`` of transformers' Qwen3-VL. Text counts on by one in all three rows.
    A temporal group stands at one time; its rows and columns count from there, and the text behind
    it goes on after the larger side. The markers and times between groups are text.
    """
    positions = np.empty((3, num_tokens), np.int64)
    token = position = 0
    for span in spans:
        text = span.start - token
        positions[:, token : span.start] = position + np.arange(text)
        position += text
        size = span.rows * span.columns
        row, column = np.divmod(np.arange(size), span.columns)
        positions[0, span.start : span.end] = position
        positions[1, span.start : span.end] = position + row
        positions[2, span.start : span.end] = position + column
        position += max(span.rows, span.columns)
        token = span.end
    positions[:, token:] = position + np.arange(num_tokens - token)
    return positions
