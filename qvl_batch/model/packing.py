"""Which sequences go through the model together: a pure decision."""

from __future__ import annotations

from collections.abc import Sequence


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
