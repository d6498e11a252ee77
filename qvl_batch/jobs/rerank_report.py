"""The account of a rerank run: counts that add up, as text and JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import InvariantBrokenError
from qvl_batch.jobs.commit_loop import Counts
from qvl_batch.jobs.report import REPORTS_FOLDER, write_text
from qvl_batch.jobs.rerank_plan import PairPlan
from qvl_batch.ranking import metrics
from qvl_batch.storage import Storage, join
from qvl_batch.tables.scores import read_where_in

if TYPE_CHECKING:
    from qvl_batch.jobs.rerank_job import RerankJob


@dataclass(kw_only=True)
class Tally:
    """What a run has committed so far; `started` once Ray was needed."""

    started: bool = False
    queries_searched: int = 0
    queries_failed: int = 0
    candidates_found: int = 0
    pairs: int = 0
    pairs_scored_before: int = 0
    pairs_failed_before: int = 0
    pairs_todo: int = 0
    pairs_scored: int = 0
    pairs_failed: int = 0
    media_todo: int = 0
    texts_todo: int = 0
    query_media_decoded: int = 0
    ranks_set: int = 0
    commits: int = 0
    waves: int = 0
    work: collections.Counter[str] = field(default_factory=collections.Counter)
    failures_by_reason: collections.Counter[str] = field(default_factory=collections.Counter)

    def searched(self, counts: Counts) -> None:
        self.queries_searched = counts.embedded
        # Not all failures are of queries: some are of given rows that no table holds.
        self.queries_failed = counts.work["queries_failed"]
        self.candidates_found = counts.rows
        self._add(counts)

    def planned(self, plan: PairPlan) -> None:
        self.pairs += plan.num_pairs
        self.pairs_scored_before += plan.num_scored_before
        self.pairs_failed_before += plan.num_failed_before
        self.pairs_todo += plan.num_todo
        texts = pc.sum(pc.equal(plan.media["kind"], "text")).as_py() or 0
        self.texts_todo += texts
        self.media_todo += plan.media.num_rows - texts

    def scored(self, counts: Counts) -> None:
        self.waves += 1
        self.pairs_scored += counts.embedded
        self.pairs_failed += counts.failed
        self._add(counts)

    def _add(self, counts: Counts) -> None:
        self.commits += counts.commits
        self.work.update(counts.work)
        self.failures_by_reason.update(counts.failures_by_reason)


@dataclass(frozen=True, kw_only=True)
class RerankReport:
    """What a run was given and what became of it.

    ``num_queries = queries_found_before + queries_failed_before + queries_searched
    + queries_failed + queries_not_reached``, and
    ``num_pairs = pairs_scored_before + pairs_failed_before + pairs_scored + pairs_failed
    + pairs_not_reached``; pairs are the candidates of the queries that the run came to.

    ``media`` are distinct within a wave, and ``texts`` need no fetch. That each was fetched and
    encoded once shows in ``media_fetched <= media`` (less by those that could not be read) and
    ``visions_encoded = parts_decoded``, plus the queries' own media, which count once for each GPU
    actor that meets them; without reuse it would be ``visions``.
    """

    run_id: str
    recipe_id: str
    first_recipe_id: str
    num_queries: int
    queries_found_before: int
    queries_failed_before: int
    queries_searched: int
    queries_failed: int
    queries_not_reached: int
    candidates_found: int
    candidates_missing: int
    num_pairs: int
    pairs_scored_before: int
    pairs_failed_before: int
    pairs_scored: int
    pairs_failed: int
    pairs_not_reached: int
    ranks_set: int
    waves: int
    media: int
    texts: int
    media_fetched: int
    media_decoded: int
    parts_decoded: int
    query_media_decoded: int
    visions: int
    visions_encoded: int
    tokens: int
    prefix_tokens_saved: int
    num_commits: int
    duration_s: float
    failures_by_reason: Mapping[str, int]
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    exit_code: int = 0

    def __post_init__(self) -> None:
        queries = (
            self.queries_found_before
            + self.queries_failed_before
            + self.queries_searched
            + self.queries_failed
            + self.queries_not_reached
        )
        pairs = (
            self.pairs_scored_before
            + self.pairs_failed_before
            + self.pairs_scored
            + self.pairs_failed
            + self.pairs_not_reached
        )
        negative = self.queries_not_reached < 0 or self.pairs_not_reached < 0
        if queries != self.num_queries or pairs != self.num_pairs or negative:
            raise InvariantBrokenError(f"The counts do not add up: {dataclasses.asdict(self)}")

    @classmethod
    def of(cls, job: RerankJob, tally: Tally, *, duration_s: float, exit_code: int) -> RerankReport:
        plan, work = job.plan, tally.work
        before, after = quality(job)
        return cls(
            run_id=job.run_id,
            recipe_id=job.recipe.recipe_id,
            first_recipe_id=job.first.recipe.recipe_id,
            num_queries=plan.num_queries,
            queries_found_before=plan.num_found_before,
            queries_failed_before=plan.num_failed_before,
            queries_searched=tally.queries_searched,
            queries_failed=tally.queries_failed,
            queries_not_reached=plan.todo.num_rows - tally.queries_searched - tally.queries_failed,
            candidates_found=tally.candidates_found,
            candidates_missing=work["rows_missing"],
            num_pairs=tally.pairs,
            pairs_scored_before=tally.pairs_scored_before,
            pairs_failed_before=tally.pairs_failed_before,
            pairs_scored=tally.pairs_scored,
            pairs_failed=tally.pairs_failed,
            pairs_not_reached=tally.pairs_todo - tally.pairs_scored - tally.pairs_failed,
            ranks_set=tally.ranks_set,
            waves=tally.waves,
            media=tally.media_todo,
            texts=tally.texts_todo,
            media_fetched=work["media_fetched"],
            media_decoded=work["media_decoded"],
            parts_decoded=work["parts_decoded"],
            query_media_decoded=tally.query_media_decoded,
            visions=work["visions"],
            visions_encoded=work["visions_encoded"],
            tokens=work["tokens"],
            prefix_tokens_saved=work["prefix_tokens_saved"],
            num_commits=tally.commits,
            duration_s=round(duration_s, 3),
            failures_by_reason=dict(sorted(tally.failures_by_reason.items())),
            before=before,
            after=after,
            exit_code=exit_code,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        missing = f", {self.candidates_missing:,} not there" if self.candidates_missing else ""
        lines = [
            f"run {self.run_id}: {self.queries_searched:,} queries searched "
            f"({self.candidates_found:,} candidates{missing}), {self.queries_failed:,} failed, "
            f"{self.queries_found_before:,} had candidates, "
            f"{self.queries_failed_before:,} failed before",
            f"{self.pairs_scored:,} pairs scored, {self.pairs_failed:,} failed, "
            f"{self.pairs_scored_before + self.pairs_failed_before:,} skipped "
            f"({self.pairs_scored_before:,} scored before, {self.pairs_failed_before:,} failed "
            f"before); {self.texts:,} texts, {self.media:,} media: {self.media_fetched:,} fetched, "
            f"{self.parts_decoded:,} parts decoded, {self.visions_encoded:,} encoded for "
            f"{self.visions:,} uses; {self.tokens:,} tokens, {self.prefix_tokens_saved:,} of them "
            f"shared; {self.num_commits} commits, {self.duration_s:.1f} s",
        ]
        if self.before is not None and self.after is not None:
            lines += [_quality_line("before", self.before), _quality_line("after", self.after)]
        if self.failures_by_reason:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.failures_by_reason.items())
            lines.append(f"failed: {reasons} (table _qvl_failures)")
        if self.queries_not_reached or self.pairs_not_reached:
            lines.append(
                f"{self.queries_not_reached:,} queries and {self.pairs_not_reached:,} pairs not "
                "reached: run the same command again"
            )
        return "\n".join(lines)


def _quality_line(when: str, values: Mapping[str, Any]) -> str:
    recalls = ", ".join(
        f"recall@{name.rpartition('_')[2]} {value:.3f}"
        for name, value in values.items()
        if name.startswith("recall_at_")
    )
    return (
        f"{when + ':':<8}nDCG@10 {values['ndcg_at_10']:.3f}, MRR@10 {values['mrr_at_10']:.3f}, "
        f"{recalls} ({values['num_queries']:,} labelled queries)"
    )


def quality(job: RerankJob) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return what the labels say of the ranks before and after; None without labels or ranks.

    Both sides judge all candidates: a pair that failed keeps its first rank, and stands behind all
    others afterwards.
    """
    if job.labels is None:
        return None, None
    target = job.target
    ids = job.queries["query_id"].combine_chunks()
    columns = ["query_id", "pair_id", "row_id", "media_id", "uri", "rank_before"]
    found, ranked = [], []
    for name in target.partitions:
        candidates = target.store.open(target.candidates(name))
        rows = read_where_in(candidates, "query_id", ids, columns)
        scores = read_where_in(target.store.open(name), "query_id", ids, ["pair_id", "rank_after"])
        if rows is not None:
            found.append(rows)
        if scores is not None:
            ranked.append(scores)
    if not found or not ranked:
        return None, None
    pairs = pa.concat_tables(found).combine_chunks()
    after = pa.concat_tables(ranked).combine_chunks()
    joined = pairs.join(after, "pair_id", join_type="left outer")
    if joined["rank_after"].null_count == joined.num_rows:
        return None, None
    before, later = (
        metrics(
            joined,
            job.labels.rows,
            rank=rank,
            relevant_from=job.config.input.relevant_from,
            query_ids=ids,
        ).to_dict()
        for rank in ("rank_before", "rank_after")
    )
    return before, later


def write_rerank_report(report: RerankReport, root: str, storage: Storage) -> str:
    """Write ``_qvl_runs/{run_id}.json`` under the root and return its address."""
    return write_text(
        join(root, REPORTS_FOLDER, f"{report.run_id}.json"), report.to_json(), storage
    )
