"""Checkpoints and engines that the model tests share. One torch thread: the machine is shared."""

import shutil
from pathlib import Path

import pytest
import torch

from qvl_batch.model.engine import EmbedEngine
from qvl_batch.model.rerank import RerankEngine

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedding_folder():
    return GOLDEN / "checkpoint" / "embedding"


@pytest.fixture(scope="session")
def reranker_folder():
    return GOLDEN / "checkpoint" / "reranker"


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def engine(embedding_folder):
    return EmbedEngine(embedding_folder)


@pytest.fixture(scope="session")
def reranker(reranker_folder):
    return RerankEngine(reranker_folder)


@pytest.fixture
def checkpoint_copy(tmp_path, embedding_folder):
    """A copy of the embedding checkpoint that a test may spoil."""
    return Path(shutil.copytree(embedding_folder, tmp_path / "checkpoint"))
