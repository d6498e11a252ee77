"""A model with everything around it, and our engine on it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from qvl_batch.model.attention import takes_prefix
from qvl_batch.model.chat import DEFAULT_RERANK_INSTRUCTION
from qvl_batch.model.encode import truncate
from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.feature_store import FeatureStore
from qvl_batch.model.forward import PackedModel, PackedPrompt
from qvl_batch.model.memory import feature_bytes
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.model.rerank import RerankEngine, ReuseCounts
from qvl_batch.units import EmbedInput
from tests.bench.shapes import Shape, packed_form, random_model, save_weights, write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Vectors(Protocol):
    """What is measured of ours."""

    def embed_vectors(self, inputs: list[EmbedInput]) -> npt.NDArray[np.float32]:
        """Return normalised vectors, shape (n, hidden)."""
        ...


class MemoryEngine:
    """The steps of ``EmbedEngine.embed_vectors`` on a model that is in no folder."""

    def __init__(self, model: PreTrainedModel, folder: Path, batch_tokens: int) -> None:
        self._tokenizer = PromptTokenizer(folder)
        self._packed = PackedModel(packed_form(model), batch_tokens=batch_tokens)

    def embed_vectors(self, inputs: list[EmbedInput]) -> npt.NDArray[np.float32]:
        """Return normalised vectors, shape (n, hidden).

        Raises:
            UnitError: The first failure, if any input fails.
        """
        states, failures = self._packed.last_states(packed_prompts(self._tokenizer, inputs))
        if failures:
            raise failures[min(failures)]
        return truncate(states, states.shape[1]).cpu().numpy()


class MemoryReranker(RerankEngine):
    """``RerankEngine`` on a model that is in no folder: only its construction is another."""

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        batch_tokens: int,
        *,
        reuse_vision: bool,
        reuse_prefix: bool,
    ) -> None:
        # The parent's would load the folder's weights.
        self.instruction = DEFAULT_RERANK_INSTRUCTION
        self.tokenizer = PromptTokenizer(folder, max_tokens=10_240)
        self._packed = PackedModel(
            packed_form(model), batch_tokens=batch_tokens, prefixes=reuse_prefix
        )
        self.reuse_vision = reuse_vision
        self.reuse_prefix = reuse_prefix and takes_prefix(model.device, model.dtype)
        self._store = FeatureStore(self._packed.tower, feature_bytes(model.device))
        self.counts = ReuseCounts()
        rows = model.get_input_embeddings().weight
        yes, no = (self.tokenizer.vocabulary_id(word) for word in ("yes", "no"))
        self._direction = rows[yes] - rows[no]


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

    def engine(self, batch_tokens: int) -> Vectors:
        """Return our engine; from the folder, as users get it, where there are weights."""
        if not self.on_disk:
            return MemoryEngine(self.plain, self.folder, batch_tokens)
        return EmbedEngine(self.folder, device=str(self.device), batch_tokens=batch_tokens)

    def reranker(self, batch_tokens: int, **options: bool) -> RerankEngine:
        """Return our reranker; from the folder, as users get it, where there are weights."""
        if not self.on_disk:
            return MemoryReranker(self.plain, self.reranker_folder, batch_tokens, **options)
        return RerankEngine(
            self.reranker_folder, device=str(self.device), batch_tokens=batch_tokens, **options
        )


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
