"""What a forward pass must compute, and what padding adds.

Counted are multiply-adds times 2, from the shapes alone. Per token of the language model: two for
every weight of its layers (the embedding table is a look-up, and there is no head). Causal
attention over n tokens: ``4 * layers * heads * head_dim * n^2 / 2``. Per 16-px patch: two for
every weight of the patch embedding and the tower's layers; attention within each temporal group of
m patches: ``4 * depth * hidden * m^2``. Per merged token: the merger and the deepstack mergers. For
the 2B shape that is 2.82 GFLOP a token, 0.607 a patch and 0.20 a merged token; the linear part
equals torch's FlopCounterMode.

Padding is counted as if padded rows were as long as their batch's longest, with causal attention:
that a padded batch needs a mask, with which most kernels compute the full square, comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.bench.shapes import Shape

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """FLOPs per token, per token squared, per patch, per patch squared and per merged token.

    ``last_layer`` and ``last_layer_pair`` are what of ``token`` and ``token_pair`` the packed pass
    computes at a sequence's last token only: the last layer but for its keys and values.
    """

    token: float
    token_pair: float
    patch: float
    patch_pair: float
    merged: float
    last_layer: float
    last_layer_pair: float

    def left_out(self, tokens: int) -> float:
        """Return the FLOPs that the packed pass does not compute of one sequence."""
        return (tokens - 1) * self.last_layer + self.last_layer_pair * (tokens**2 - 2 * tokens)

    def language(self, tokens: int) -> float:
        """Return the FLOPs of one sequence in the language model."""
        return self.token * tokens + self.token_pair * tokens**2

    def tower(self, grid: Grid) -> float:
        """Return the FLOPs of one image or video in the tower."""
        groups, rows, columns = grid
        patches = rows * columns
        merged = patches / 4 * self.merged
        return groups * (self.patch * patches + self.patch_pair * patches**2 + merged)


def cost_of(shape: Shape) -> Cost:
    """Return the costs of a shape."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * (width + kv_width) + 3 * shape.hidden * shape.inter
    block = 4 * shape.vision_hidden**2 + 2 * shape.vision_hidden * shape.vision_inter
    merge_width = 4 * shape.vision_hidden
    merger = merge_width**2 + merge_width * shape.hidden
    return Cost(
        token=2.0 * shape.layers * layer,
        token_pair=4.0 * shape.layers * width / 2,
        patch=2.0 * (shape.vision_depth * block + 1536 * shape.vision_hidden),
        patch_pair=4.0 * shape.vision_depth * shape.vision_hidden,
        merged=2.0 * (1 + len(shape.deepstack)) * merger,
        last_layer=2.0 * (layer - 2 * shape.hidden * kv_width),
        last_layer_pair=4.0 * width / 2,
    )


@dataclass(frozen=True)
class Work:
    """What a way of batching computes: token positions and FLOPs, useful and in all."""

    tokens: int
    positions: int
    useful_flops: float
    flops: float

    @property
    def padded_positions(self) -> float:
        """Share of the computed token positions that is padding, 0..1."""
        return 1 - self.tokens / self.positions

    @property
    def padded_flops(self) -> float:
        """Share of the computed FLOPs that is padding, 0..1."""
        return 1 - self.useful_flops / self.flops


def work(cost: Cost, batches: Iterable[Sequence[int]], grids: Sequence[Grid]) -> Work:
    """Return the work of batches of sequence lengths, each padded to its longest.

    Packed sequences count as batches of one.
    """
    towers = sum(cost.tower(grid) for grid in grids)
    tokens, positions, useful, flops = 0, 0, towers, towers
    for lengths in batches:
        longest = max(lengths)
        tokens += sum(lengths)
        positions += longest * len(lengths)
        useful += sum(map(cost.language, lengths))
        flops += cost.language(longest) * len(lengths)
    return Work(tokens, positions, useful, flops)
