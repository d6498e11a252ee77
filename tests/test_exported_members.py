"""What a notebook finds in the package: little, sorted, and only then imported."""

import subprocess
import sys

import pytest

import qvl_batch


def test_exported_members_are_sorted_and_there():
    assert qvl_batch.__all__ == ["Embedder", "Reranker", "__version__", "connect"]
    assert qvl_batch.__all__ == sorted(qvl_batch.__all__)
    for name in qvl_batch.__all__:
        assert getattr(qvl_batch, name) is not None
    assert set(qvl_batch.__all__) <= set(dir(qvl_batch))
    assert qvl_batch.Embedder.__module__ == "qvl_batch.api.embedder"
    assert qvl_batch.Reranker.__module__ == "qvl_batch.api.reranker"
    assert qvl_batch.connect.__module__ == "qvl_batch.api.connect"


def test_another_name_is_no_member():
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        _ = qvl_batch.Embeder


def test_they_need_neither_ray_nor_lance():
    script = (
        "import sys, qvl_batch\n"
        "assert 'torch' not in sys.modules\n"
        "from qvl_batch import Embedder, Reranker\n"
        "print(*{'torch', 'ray', 'lance', 'lancedb', 'PIL', 'av'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "torch" in loaded
    assert loaded.isdisjoint({"ray", "lance", "lancedb", "av"})


def test_connecting_needs_neither_ray_nor_torch():
    script = (
        "import sys\n"
        "from qvl_batch import connect\n"
        "print(*{'torch', 'ray', 'transformers', 'av'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
