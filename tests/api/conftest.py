"""What the tests of this room share: the shipped checkpoints, small media, one torch thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvl_batch import Embedder, Reranker
from qvl_batch.demo.checkpoint import DEMO_RECIPE, embedding_dir, reranker_dir

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
BUDGETS = {name: DEMO_RECIPE[name] for name in ("image", "video", "document")}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def media() -> Path:
    return GOLDEN / "media"


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder(embedding_dir(), max_tokens=4096, **BUDGETS) as one:
        yield one


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with Reranker(reranker_dir(), **BUDGETS) as one:
        yield one
