"""A model with everything around it, and our engine on it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.forward import PackedPrompt
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.units import EmbedInput
from tests.bench.shapes import Shape, packed_form, random_model, save_weights, write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Bed:
    """One model to measure.

    ``folder`` and ``reranker_folder`` hold tokenizer, configuration and, if ``on_disk``, weights;
    ``plain`` is the same model as transformers makes it.
    """

    shape: Shape
    folder: Path
    reranker_folder: Path
    plain: PreTrainedModel
    on_disk: bool

    @property
    def device(self) -> torch.device:
        return self.plain.device

    def engine(self, batch_tokens: int) -> EmbedEngine:
        """Return our engine."""
        return EmbedEngine(self.folder, batch_tokens=batch_tokens, **self._weights())

    def reranker(self, batch_tokens: int, **options: bool) -> RerankEngine:
        """Return our reranker."""
        return RerankEngine(
            self.reranker_folder, batch_tokens=batch_tokens, **self._weights(), **options
        )

    def _weights(self) -> dict[str, Any]:
        """Return what makes an engine take the folder's weights, as users do, where it has some."""
        if self.on_disk:
            return {"device": str(self.device)}
        return {"model": packed_form(self.plain)}


def make_bed(shape: Shape, device: torch.device, scratch: Path) -> Bed:
    """Make a model, in bfloat16 on a GPU and float32 on a CPU; ``small`` is written to disk."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    plain = random_model(shape, device, dtype)
    folder = write_folder(scratch / "embedding", shape)
    reranker = write_folder(scratch / "reranker", shape, reranker=True)
    on_disk = shape.name == "small"
    if on_disk:
        save_weights(plain, folder)
        shutil.copy(folder / "model.safetensors", reranker)
    return Bed(shape, folder, reranker, plain, on_disk)


def num_parameters(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


def packed_prompts(tokenizer: PromptTokenizer, inputs: Sequence[EmbedInput]) -> list[PackedPrompt]:
    """Return what the packed model takes."""
    return [
        PackedPrompt(tokenizer.encode(unit), (*unit.videos, *unit.images), unit.uri)
        for unit in inputs
    ]
