"""The vision tower over images and videos, in chunks that fit into memory.

The blocks and mergers are transformers' own modules. What stands around them is ours, since it
depends on nothing but the grids: positions are made once a grid size, not once a patch.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from qvl_batch.budget import FRAME_FACTOR, MERGE
from qvl_batch.model.memory import attempt
from qvl_batch.model.packing import Piece, chunk, halves
from qvl_batch.model.patches import patch_rows, still_rows
from qvl_batch.units import Vision


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the tower makes of an image or a video: one row per language-model token.

    ``embeds`` has shape (tokens, hidden); ``deepstack`` holds one such tensor for each of the
    first language-model layers.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    @property
    def size_bytes(self) -> int:
        return self.embeds.nbytes + sum(layer.nbytes for layer in self.deepstack)


def join_features(parts: Sequence[VisionFeatures]) -> VisionFeatures:
    """Return the features of several visions behind each other."""
    if len(parts) == 1:
        return parts[0]
    layers = zip(*(part.deepstack for part in parts), strict=True)
    return VisionFeatures(
        torch.cat([part.embeds for part in parts]), tuple(torch.cat(layer) for layer in layers)
    )


class VisionTower:
    """Computes features.

    Args:
        visual: transformers' ``Qwen3VLVisionModel``, its patch embedding a ``LinearPatchEmbed``.
        max_patches: Patches of one pass; halved for good when memory runs out.
        hard_limit_patches: Treat a longer pass as out of memory.
    """

    def __init__(
        self,
        visual: torch.nn.Module,
        *,
        max_patches: int,
        hard_limit_patches: int | None = None,
    ) -> None:
        self._visual = visual
        self.max_patches = max_patches
        self.hard_limit_patches = hard_limit_patches
        # Images and videos that have gone through, however often each.
        self.num_encoded = 0
        self._places = functools.lru_cache(maxsize=256)(self._place)

    @torch.inference_mode()
    def features(self, visions: Sequence[Vision]) -> list[VisionFeatures]:
        """Return the features of every image and video, in their order.

        Raises:
            torch.OutOfMemoryError: If one temporal group does not fit even alone.
        """
        parts: list[list[VisionFeatures]] = [[] for _ in visions]
        chunks = collections.deque(chunk([v.grid for v in visions], self.max_patches))
        while chunks:
            pieces = chunks.popleft()
            patches = sum(_num_patches(visions[piece.index], piece) for piece in pieces)
            smaller = halves(pieces)
            fits = patches <= self.max_patches or smaller is None
            done = self._try(visions, pieces, patches) if fits else None
            if done is not None:
                for piece, features in zip(pieces, done, strict=True):
                    parts[piece.index].append(features)
            elif smaller is None:
                raise torch.OutOfMemoryError(f"{patches} patches of one image or pair of frames")
            else:
                # Smaller from here on: the next chunk would most likely fail as well.
                self.max_patches = max(1, min(self.max_patches, patches // 2))
                chunks.extendleft(reversed(smaller))
        self.num_encoded += len(visions)
        return [join_features(part) for part in parts]

    def _try(
        self, visions: Sequence[Vision], pieces: Sequence[Piece], patches: int
    ) -> list[VisionFeatures] | None:
        """Return the pieces' features, or None if memory ran out."""
        if self.hard_limit_patches and patches > self.hard_limit_patches:
            return None
        return attempt(lambda: self._run(visions, pieces), self._visual.device)

    def _run(self, visions: Sequence[Vision], pieces: Sequence[Piece]) -> list[VisionFeatures]:
        visual, device = self._visual, self._visual.device
        hidden = self._embedded(visions, pieces)
        grids = [(piece.last - piece.first, *visions[piece.index].grid[1:]) for piece in pieces]
        places = {grid[1:]: self._positions(*grid[1:]) for grid in grids}
        table, cos, sin = (
            torch.cat([places[grid[1:]][part].repeat(grid[0], 1) for grid in grids])
            for part in range(3)
        )
        hidden = hidden + table.to(hidden.dtype)
        sizes = [rows * columns for groups, rows, columns in grids for _ in range(groups)]
        edges = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
        deepstack = []
        for number, block in enumerate(visual.blocks):
            hidden = block(
                hidden, cu_seqlens=edges, max_seqlen=max(sizes), position_embeddings=(cos, sin)
            )
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[len(deepstack)]
                deepstack.append(merger(hidden))
        tokens = [groups * rows * columns // (MERGE * MERGE) for groups, rows, columns in grids]
        layers = zip(*(layer.split(tokens) for layer in deepstack), strict=True)
        return [
            VisionFeatures(embeds, layer)
            for embeds, layer in zip(visual.merger(hidden).split(tokens), layers, strict=True)
        ]

    def _embedded(self, visions: Sequence[Vision], pieces: Sequence[Piece]) -> torch.Tensor:
        """Return the patch embeddings, stills and videos each in one product, in order."""
        visual = self._visual
        outputs: dict[int, torch.Tensor] = {}
        for is_video, make_rows in ((False, still_rows), (True, patch_rows)):
            chosen = [
                (number, piece)
                for number, piece in enumerate(pieces)
                if (len(visions[piece.index].pixels) > 1) == is_video
            ]
            if not chosen:
                continue
            rows = []
            for _, piece in chosen:
                frames = slice(piece.first * FRAME_FACTOR, piece.last * FRAME_FACTOR)
                pixels = visions[piece.index].pixels[frames]
                rows.append(make_rows(pixels, visual.device, visual.dtype))
            embedded = visual.patch_embed(torch.cat(rows)).split([len(part) for part in rows])
            outputs |= zip((number for number, _ in chosen), embedded, strict=True)
        return torch.cat([outputs[number] for number in range(len(pieces))])

    def _positions(
        self, rows: int, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the learned position rows of one temporal group, and its rotation's two parts."""
        indices, weights, coordinates = self._places(rows, columns)
        table = (self._visual.pos_embed(indices) * weights[:, :, None]).sum(1)
        return table, *self._visual.rotary_pos_emb(table, coordinates)

    def _place(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        visual = self._visual
        grid = torch.tensor([[1, rows, columns]])
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        coordinates = get_vision_position_ids(grid, visual.spatial_merge_size)
        return tuple(part.to(visual.device) for part in (indices, weights, coordinates))


def _num_patches(vision: Vision, piece: Piece) -> int:
    _, rows, columns = vision.grid
    return (piece.last - piece.first) * rows * columns
