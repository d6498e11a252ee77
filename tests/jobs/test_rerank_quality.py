"""The rerank job lifts a weak first stage: its own report says by how much."""

import json

import pytest

from qvl_batch.demo.checkpoint import DEMO_RECIPE, reranker_dir
from qvl_batch.demo.evaluation import EXACT, write_evaluation
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.rerank import run_rerank
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.rerank_config import parse_rerank_config

TOP_K = 20


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("local_ray")
def test_reranking_lifts_16_binary_dimensions(make_job, tmp_path):
    written = write_evaluation(tmp_path / "set", picture_families=20, clip_families=5)
    job = make_job(str(written.media_dir))
    embedded = run_embed(job.config("recipe.dim=16", "recipe.encodings=[binary]"), echo=str)
    assert embedded.exit_code == 0
    config = parse_rerank_config(
        {
            "input": {
                "queries": str(written.queries_path),
                "relevance": str(written.labels_path),
                "relevant_from": EXACT,
            },
            "search": {
                "root": job.root,
                "top_k": TOP_K,
                "rescore": False,
                "query_instruction": DEFAULT_INSTRUCTION,
            },
            "output": {"partition_by": ["scene"]},
            "model": {
                "path": str(reranker_dir()),
                **{name: DEMO_RECIPE[name] for name in ("image", "video", "document")},
            },
        }
    )

    report = run_rerank(config, echo=str)

    print(json.dumps({"before": report.before, "after": report.after}, indent=1))
    assert report.exit_code == 0
    assert (report.num_queries, report.pairs_scored, report.pairs_failed) == (100, 2000, 0)
    before, after = report.before, report.after
    assert before["num_queries"] == after["num_queries"] == 100
    assert after["num_unranked"] == 0
    assert after["recall_at_1"] > before["recall_at_1"] + 0.1
    assert after["ndcg_at_10"] > before["ndcg_at_10"] + 0.04
    # Reranking orders what was found and finds nothing more.
    assert after[f"recall_at_{TOP_K}"] == before[f"recall_at_{TOP_K}"]
    assert report.visions_encoded == report.media_fetched <= 100
