"""`Reranker` in one process: texts, pictures and clips on either side."""

import numpy as np
import pytest
from PIL import Image

from qvl_batch import Reranker
from qvl_batch.api.golden import read_golden
from qvl_batch.errors import CorruptMediaError, InputError
from tests.api.conftest import GOLDEN
from tests.api.test_embedder import resolved


def test_scores_are_the_official_ones():
    folder = GOLDEN / "checkpoint" / "reranker"
    checked = 0
    with Reranker(folder, dtype="float32", device="cpu", frame_list="official") as one:
        for case in read_golden(GOLDEN)[1]:
            fed = case.entry.get("input")
            if not case.is_rerank or not isinstance(fed, dict) or case.official_failure():
                continue
            stored = case.arrays.get("scores")
            stored = case.entry.get("scores") if stored is None else stored
            documents = fed.get("documents") or []
            if not documents or stored is None or len(stored) != len(documents):
                continue
            shared = {key: fed[key] for key in ("fps", "max_frames") if fed.get(key)}
            sides = [
                {key: resolved(value) for key, value in side.items()} | shared
                for side in ((fed.get("query") or {}), *documents)
            ]
            if any(case.official_pair_failure(i, len(stored)) for i in range(len(documents))):
                continue
            scores = one.score(sides[0], sides[1:], fed.get("instruction"))
            assert (scores.dtype, scores.shape) == (np.float32, (len(documents),))
            assert np.abs(scores - np.array(stored)).max() <= 1e-5, case.name
            checked += 1
    assert checked >= 5


def test_every_form_on_either_side(reranker, media):
    path = media / "sq_256.png"
    forms = [path, path.read_bytes(), Image.open(path), {"image": str(path)}]
    by_document = reranker.score("a red circle", forms)
    np.testing.assert_allclose(by_document, by_document[0], atol=1e-6)
    by_query = [reranker.score(form, ["a red circle"])[0] for form in forms]
    np.testing.assert_allclose(by_query, by_query[0], atol=1e-6)
    assert reranker.score("a", []).shape == (0,)


def test_an_instruction_changes_scores(reranker):
    documents = ["a red circle", "a blue square"]
    plain = reranker.score("red", documents)
    told = reranker.score("red", documents, "Say no to everything")
    assert np.abs(plain - told).max() > 1e-6
    with pytest.raises(InputError, match=r"score\(\.\.\., instruction=\.\.\.\)"):
        reranker.score("red", [{"text": "a", "instruction": "b"}])


def test_bad_documents(reranker, media):
    documents = ["a red circle", media / "corrupt.jpg", "a dog"]
    with pytest.raises(CorruptMediaError, match=r"^document 1 \(.*corrupt\.jpg\)"):
        reranker.score("red", documents)
    scores, errors = reranker.score("red", documents, errors="return")
    assert list(errors) == [1]
    assert np.isnan(scores).tolist() == [False, True, False]
    np.testing.assert_allclose(
        scores[[0, 2]], reranker.score("red", [documents[0], documents[2]]), atol=1e-6
    )
    with pytest.raises(CorruptMediaError, match=r"^query \("):
        reranker.score(media / "corrupt.jpg", documents, errors="return")
    with pytest.raises(InputError, match="document 1: a int is no item"):
        reranker.score("red", ["a", 3])
