"""Which sequences go through the model together, and which frames through the tower: decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def pack(num_tokens: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Split sequences into packs of at most ``budget_tokens``, in their order.

    A sequence longer than the budget is a pack of its own. No sequence is padded or split, so the
    order does not change what is computed, only how much at a time.

    Returns:
        Indices per pack; every index once.
    """
    packs: list[list[int]] = []
    room = 0
    for index, tokens in enumerate(num_tokens):
        if not packs or tokens > room:
            packs.append([])
            room = budget_tokens
        packs[-1].append(index)
        room -= tokens
    return packs


@dataclass(frozen=True, slots=True)
class Piece:
    """Temporal groups ``first`` to ``last`` (exclusive) of the vision at ``index``."""

    index: int
    first: int
    last: int


def chunk(grids: Sequence[tuple[int, int, int]], budget_patches: int) -> list[list[Piece]]:
    """Split images and videos into tower passes of at most ``budget_patches``, in their order.

    In the tower a temporal group attends only to itself, so a video may be split between groups
    without changing a value. One group larger than the budget is a chunk of its own.

    Args:
        grids: (temporal groups, rows, columns) in patches.
        budget_patches: Patches of one pass.

    Returns:
        Pieces per chunk; every group of every vision once.
    """
    chunks: list[list[Piece]] = []
    room = 0
    for index, (groups, rows, columns) in enumerate(grids):
        size, first = rows * columns, 0
        while first < groups:
            if not chunks or size > room:
                chunks.append([])
                room = budget_patches
            last = min(groups, first + max(1, room // size))
            chunks[-1].append(Piece(index, first, last))
            room -= (last - first) * size
            first = last
    return chunks


def halves(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]] | None:
    """Split a chunk in two, in order; None if it is a single temporal group."""
    middle = len(pieces) // 2
    if middle:
        return list(pieces[:middle]), list(pieces[middle:])
    (piece,) = pieces
    middle = (piece.first + piece.last) // 2
    if middle == piece.first:
        return None
    return [Piece(piece.index, piece.first, middle)], [Piece(piece.index, middle, piece.last)]
