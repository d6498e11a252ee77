"""Padded batches on transformers' own modules: what everybody else computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from qvl_batch.model.encode import truncate
from qvl_batch.model.patches import LinearPatchEmbed, patch_rows
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.units import EmbedInput
from tests.bench.beds import packed_prompts
from tests.bench.shapes import sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PaddedEngine:
    """Embeds prepared inputs in right-padded batches.

    Ids, pixels and the tower's patch product are ours, so that a difference in time to the packed
    engine is batching, attention, and what the packed pass leaves out of the last layer.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self._model = sharing(model)
        self._model.visual.patch_embed = LinearPatchEmbed(self._model.visual.patch_embed.proj)
        self._tokenizer = PromptTokenizer(folder)

    def embed_vectors(
        self, inputs: Sequence[EmbedInput], batches: Sequence[Sequence[int]]
    ) -> npt.NDArray[np.float32]:
        """Return normalised vectors in the order of the inputs, shape (n, hidden)."""
        rows: list[torch.Tensor | None] = [None] * len(inputs)
        for batch in batches:
            states = self._last_states([inputs[i] for i in batch])
            for index, state in zip(batch, states, strict=True):
                rows[index] = state
        stacked = torch.stack([row for row in rows if row is not None])
        return truncate(stacked, stacked.shape[1]).cpu().numpy()

    @torch.inference_mode()
    def _last_states(self, inputs: Sequence[EmbedInput]) -> torch.Tensor:
        device, dtype = self._model.device, self._model.dtype
        special = self._tokenizer.special
        prompts = [prompt.prompt.ids for prompt in packed_prompts(self._tokenizer, inputs)]
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), special["<|endoftext|>"])
        mask = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        types = (ids == special["<|image_pad|>"]) + 2 * (ids == special["<|video_pad|>"])
        visions = {
            "pixel_values": [image for unit in inputs for image in unit.images],
            "pixel_values_videos": [video for unit in inputs for video in unit.videos],
        }
        given = {
            name: torch.cat([patch_rows(part.pixels, device, dtype) for part in parts])
            for name, parts in visions.items()
            if parts
        }
        given |= {
            "image_grid_thw" if name == "pixel_values" else "video_grid_thw": torch.tensor(
                [part.grid for part in parts], device=device
            )
            for name, parts in visions.items()
            if parts
        }
        out = self._model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            mm_token_type_ids=torch.from_numpy(types).to(device),
            use_cache=False,
            **given,
        )
        last = torch.from_numpy(mask.sum(axis=1) - 1).to(device)
        return out.last_hidden_state[torch.arange(len(prompts), device=device), last]


def in_order(count: int, size: int) -> list[list[int]]:
    """Return batches of ``size`` in the order of arrival."""
    return [list(range(count))[start : start + size] for start in range(0, count, size)]


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return batches of ``size``, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]
