"""Access to checkpoints for the jobs: what the driver asks of them and what workers load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

from qvl_batch import __version__
from qvl_batch.config import ModelSection
from qvl_batch.recipe import Recipe, RerankRecipe
from qvl_batch.rerank_config import RerankerSection
from qvl_batch.storage import Storage
from qvl_batch.units import Engine

Section = TypeVar("Section", ModelSection, RerankerSection)


class Model(Protocol):
    """What a job needs of an embedding model; pickled to the workers."""

    resize: str

    def digest(self) -> str:
        """Return the digest of the weights."""
        ...

    def dim(self) -> int:
        """Return the full width of its vectors."""
        ...

    def stated(self) -> dict[str, str]:
        """Return what tables state of the model beside the recipe (not hashed)."""
        ...

    def load_engine(self, recipe: Recipe) -> Engine:
        """Load the weights."""
        ...

    def load_counter(self, recipe: Recipe) -> Callable[..., int]:
        """Return the function that counts the tokens of a prompt that no cut may take.

        Called with ``instruction`` and ``plans``: captions do not count, since they are cut.
        """
        ...


class RerankModel(Protocol):
    """What the rerank job needs of a reranker; pickled to the workers."""

    resize: str

    def digest(self) -> str:
        """Return the digest of the weights."""
        ...

    def check(self) -> None:
        """Raise `ModelError` if it can not be used; loads no weights but the head's two rows."""
        ...

    def default_instruction(self) -> str:
        """Return what counts as relevant where nobody says."""
        ...

    def stated(self) -> dict[str, str]:
        """Return what tables state of the model beside the recipe (not hashed)."""
        ...

    def load_engine(self, recipe: RerankRecipe) -> Any:
        """Load the weights; returns a `rerank_stages.RerankerEngine`."""
        ...


@dataclass(frozen=True)
class _Checkpoint(Generic[Section]):
    """A checkpoint: a local folder, a hub id, or an object-store folder."""

    section: Section
    storage: Storage
    batch_tokens: int | Literal["auto"] = "auto"
    threads: int | None = None
    resize: str = "qvl_batch.model.resize:resize_frame"

    @classmethod
    def of(cls, section: Section, storage: Storage, batch_tokens: int | Literal["auto"]) -> Self:
        """Return the checkpoint with a local folder made absolute: workers run elsewhere."""
        if os.path.isdir(section.path):
            section = section.model_copy(update={"path": os.path.abspath(section.path)})
        return cls(section, storage, batch_tokens)

    def folder(self) -> Path:
        """Return the folder on this node, fetched if need be; not kept, since nodes differ."""
        from qvl_batch.model.load import resolve_model

        return resolve_model(self.section.path, self.section.revision, self.storage)

    def digest(self) -> str:
        from qvl_batch.model.load import weights_digest

        return weights_digest(self.folder())


@dataclass(frozen=True)
class QwenCheckpoint(_Checkpoint[ModelSection]):
    """A Qwen3-VL-Embedding checkpoint."""

    def dim(self) -> int:
        from qvl_batch.model.load import full_dim

        return full_dim(self.folder())

    def stated(self) -> dict[str, str]:
        return {
            "qvl.versions": _versions(),
            "qvl.model": self.section.path,
            "qvl.revision": self.section.revision or "",
            "qvl.dtype": self.section.dtype,
            "qvl.query_instruction": self.section.query_instruction,
        }

    def load_engine(self, recipe: Recipe) -> Engine:
        from qvl_batch.model.engine import EmbedEngine

        return EmbedEngine(
            self.folder(),
            dim=recipe.dim,
            encodings=recipe.encodings,
            instruction=recipe.instruction,
            max_tokens=recipe.max_tokens,
            token_layout=recipe.token_layout,
            dtype=self.section.dtype,
            batch_tokens=self.batch_tokens,
            threads=self.threads,
        )

    def load_counter(self, recipe: Recipe) -> Callable[..., int]:
        from qvl_batch.model.prompt import PromptTokenizer

        return PromptTokenizer(
            self.folder(),
            default_instruction=recipe.instruction,
            max_tokens=recipe.max_tokens,
            token_layout=recipe.token_layout,
        ).count_uncuttable


@dataclass(frozen=True)
class QwenReranker(_Checkpoint[RerankerSection]):
    """A Qwen3-VL-Reranker checkpoint."""

    def check(self) -> None:
        from qvl_batch.model.load import check_folder, load_head_rows
        from qvl_batch.model.prompt import PromptTokenizer

        folder = self.folder()
        check_folder(folder)
        tokenizer = PromptTokenizer(folder, max_tokens=self.section.max_tokens)
        load_head_rows(folder, [tokenizer.vocabulary_id(word) for word in ("yes", "no")])

    def default_instruction(self) -> str:
        from qvl_batch.model.chat import DEFAULT_RERANK_INSTRUCTION

        return DEFAULT_RERANK_INSTRUCTION

    def stated(self) -> dict[str, str]:
        return {
            "qvl.versions": _versions(),
            "qvl.model": self.section.path,
            "qvl.revision": self.section.revision or "",
            "qvl.dtype": self.section.dtype,
        }

    def load_engine(self, recipe: RerankRecipe) -> Any:
        from qvl_batch.model.rerank import RerankEngine

        return RerankEngine(
            self.folder(),
            instruction=recipe.instruction,
            max_tokens=recipe.max_tokens,
            token_layout=recipe.token_layout,
            dtype=self.section.dtype,
            batch_tokens=self.batch_tokens,
            threads=self.threads,
        )


def _versions() -> str:
    packages = ("torch", "transformers", "pillow", "av", "pypdfium2", "pylance")
    # Our own is not asked for by name: a cluster may run it uninstalled.
    return json.dumps({"qvl-batch": __version__} | {name: version(name) for name in packages})
