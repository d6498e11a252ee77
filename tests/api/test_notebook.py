"""The README's notebook cell, run as it stands on the shipped checkpoints."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from qvl_batch.demo.checkpoint import embedding_dir, reranker_dir

README = Path(__file__).parents[2] / "README.md"
CELL = """\
from pathlib import Path

import numpy as np
from PIL import Image

from qvl_batch import Embedder, Reranker

embedder = Embedder("Qwen/Qwen3-VL-Embedding-2B", dim=1024, video={"max_frames": 32})
items = [
    "a text is a str",
    Path("photo.png"),
    {"image": Image.open("photo.png"), "text": "with a caption"},
    {"video": "clip.mp4", "fps": 2, "instruction": "Find the clip."},
    {"video": [np.zeros((90, 160, 3), np.uint8)] * 8, "fps": 2},
    {"document": "report.pdf", "page": 0},
]
vectors = embedder.embed(items)
best = items[np.argmax(vectors @ embedder.embed_query("a red circle"))]
vectors, errors = embedder.embed([*items, Path("gone.png")], errors="return")

reranker = Reranker("Qwen/Qwen3-VL-Reranker-2B")
scores = reranker.score("a red circle", items[:3])
"""


@pytest.fixture
def folder(tmp_path, media, monkeypatch):
    from qvl_batch.api.parity import CASES

    shutil.copy(media / "sq_256.png", tmp_path / "photo.png")
    shutil.copy(CASES / "clip.mp4", tmp_path / "clip.mp4")
    shutil.copy(CASES / "page.pdf", tmp_path / "report.pdf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_cell_runs(folder):
    code = (
        CELL.replace("Qwen/Qwen3-VL-Embedding-2B", str(embedding_dir()))
        .replace("Qwen/Qwen3-VL-Reranker-2B", str(reranker_dir()))
        .replace("dim=1024", "dim=64")
    )
    cell = {}
    exec(compile(code, "README", "exec"), cell)
    assert cell["vectors"].shape == (7, 64)
    assert list(cell["errors"]) == [6]
    assert "no such file" in cell["errors"][6].reason
    assert np.isnan(cell["vectors"]).any(axis=1).tolist() == [False] * 6 + [True]
    assert ((cell["scores"] >= 0) & (cell["scores"] <= 1)).all()
    cell["embedder"].close()
    cell["reranker"].close()


def test_the_readmes_cell_is_this_one():
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert [block for block in blocks if "Embedder(" in block] in ([], [CELL])
