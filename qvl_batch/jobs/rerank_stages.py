"""The second half of the rerank job: media with their pairs in, scores out. Plain callables.

One row a medium, in the order given: a replayed task must deliver the same blocks again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import schema
from qvl_batch.errors import CorruptMediaError, QvlError, UnitError
from qvl_batch.jobs.deaths import Attempts, NoAttempts, run_carefully
from qvl_batch.jobs.media_reader import ReadMedia, WantedMedium
from qvl_batch.jobs.parts import Part, iter_parts, parts_array
from qvl_batch.jobs.retrieve_stages import failures_array
from qvl_batch.jobs.stages import NOT_STARTED, Written, failure_value
from qvl_batch.media.fetch import FetchRequest
from qvl_batch.storage import Storage
from qvl_batch.tables.fragments import write_fragments
from qvl_batch.units import EmbedInput, Vision

# Pairs that are tokenised at once.
_MAX_PAIRS_A_CALL = 4096
_WORK = [field.name for field in schema.WORK]


class RerankerEngine(Protocol):
    """What the stage needs of `qvl_batch.model.rerank.RerankEngine`."""

    counts: Any

    def judge_pairs(self, pairs: Sequence[Any]) -> list[Any]: ...


# Gives a query's side of the prompt, or a `schema.FAILURE` value that says why there is none.
Queries = Callable[[str], EmbedInput | Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DecodeDocuments:
    """Fetches each medium once and decodes the segments that its pairs want.

    Adds ``_parts``, ``_failure`` and ``_work``. A text has no medium: its row holds it.
    """

    media: ReadMedia
    may_start: Callable[[int], bool] = lambda _: True
    attempts: Attempts = field(default_factory=NoAttempts)
    max_deaths: int = 3

    def open(self) -> DocumentDecoder:
        return DocumentDecoder(self)


class DocumentDecoder:
    """A `DecodeDocuments` at work."""

    def __init__(self, stage: DecodeDocuments) -> None:
        self._stage = stage
        self._reader = stage.media.open()

    def __call__(self, media: pa.Table) -> pa.Table:
        if not self._stage.may_start(media["_ordinal"][0].as_py()):
            return _decoded(media, [NOT_STARTED] * media.num_rows, 0)
        return run_carefully(
            media,
            "decode",
            self._decode,
            lambda medium, failure: _decoded(medium, [failure], 0),
            self._stage.attempts,
            self._stage.max_deaths,
        )

    def _decode(self, media: pa.Table) -> pa.Table:
        before = self._reader.num_fetched
        read = self._read(media)
        return _decoded(media, read, self._reader.num_fetched - before)

    def _read(self, media: pa.Table) -> list[list[Part] | Mapping[str, Any]]:
        rows = media.select(["uri", "etag", "byte_offset", "byte_length", "kind"]).to_pylist()
        segments = pc.list_flatten(media["_pairs"]).combine_chunks().field("segment").to_pylist()
        sizes = pc.list_value_length(media["_pairs"]).to_pylist()
        wanted, start = [], 0
        for row, size in zip(rows, sizes, strict=True):
            mine = frozenset(segments[start : start + size])
            start += size
            if row["kind"] != "text":
                kind = row.pop("kind")
                request = FetchRequest(**row)
                wanted.append(WantedMedium(request=request, kind=kind, segments=mine))
        read = self._reader.read_all(wanted)
        outcomes: list[list[Part] | Mapping[str, Any]] = []
        for row in rows:
            # What was fetched has no kind left.
            outcome = [] if "kind" in row else next(read)
            outcomes.append(failure_value(outcome) if isinstance(outcome, UnitError) else outcome)
        return outcomes


def _decoded(
    media: pa.Table, read: Sequence[list[Part] | Mapping[str, Any]], num_fetched: int
) -> pa.Table:
    """Return media and what became of them."""
    parts = [one if isinstance(one, list) else [] for one in read]
    failures = [None if isinstance(one, list) else one for one in read]
    work = _no_work(media.num_rows)
    for counts, found in zip(work, parts, strict=True):
        counts |= {"media_decoded": int(bool(found)), "parts_decoded": len(found)}
    work[0]["media_fetched"] = num_fetched
    return (
        media.append_column("_parts", parts_array(parts))
        .append_column("_failure", failures_array(failures))
        .append_column("_work", pa.array(work, schema.WORK))
    )


class RerankPairs:
    """Scores the pairs of a block of media: adds ``_scores`` (aligned with ``_pairs``).

    Pairs of one query stand together, so that they share what comes before the document; a
    medium's features serve all its pairs.

    Args:
        load: Gives the engine.
        open_queries: Gives what a query_id stands for.
        attempts: Knows on which blocks a worker has died.
        max_deaths: Deaths of workers after which the pairs of the medium at hand fail.
    """

    def __init__(
        self,
        load: Callable[[], RerankerEngine],
        open_queries: Callable[[], Queries],
        attempts: Attempts = NoAttempts(),
        max_deaths: int = 3,
    ) -> None:
        self._attempts, self._max_deaths = attempts, max_deaths
        self._broken: QvlError | None = None
        try:
            self._engine = load()
        except QvlError as error:
            self._broken = error
        self._queries = open_queries()

    def __call__(self, decoded: pa.Table) -> pa.Table:
        if self._broken is not None:
            raise self._broken
        return run_carefully(
            decoded,
            "rerank",
            self._judge,
            lambda medium, failure: self._judge(_failed(medium, failure)),
            self._attempts,
            self._max_deaths,
        )

    def _judge(self, decoded: pa.Table) -> pa.Table:
        scores, work = self._score(decoded)
        values = pa.array(scores, schema.SCORE)
        lists = decoded["_pairs"].combine_chunks()
        offsets = pa.array(np.r_[0, np.cumsum(pc.list_value_length(lists))], pa.int32())
        aligned = pa.ListArray.from_arrays(offsets, values)
        added = decoded["_work"].to_pylist()
        added[0] |= work
        return (
            decoded.drop_columns(["_parts", "_work"])
            .append_column("_scores", aligned)
            .append_column("_work", pa.array(added, schema.WORK))
        )

    def _score(self, decoded: pa.Table) -> tuple[list[dict[str, Any]], dict[str, int]]:
        # Not above: it imports torch, which the driver can do without.
        from qvl_batch.model.pairs import Pair

        lists = decoded["_pairs"].combine_chunks()
        flat, owners = pc.list_flatten(lists), pc.list_parent_indices(lists).to_pylist()
        columns = ("query_id", "segment", "kind", "text", "uri")
        rows = list(zip(*(flat.field(name).to_pylist() for name in columns), strict=True))
        failures, ordinals = (decoded[name].to_pylist() for name in ("_failure", "_ordinal"))
        visions: list[dict[int, Vision]] = [
            {part["segment"]: vision for part, vision in parts}
            for parts in iter_parts(decoded["_parts"])
        ]
        queries: dict[str, EmbedInput | Mapping[str, Any]] = {}
        results: list[dict[str, Any]] = [{} for _ in rows]
        pairs: list[tuple[str, int, Pair]] = []
        for place, (owner, row) in enumerate(zip(owners, rows, strict=True)):
            query_id, segment, kind, text, uri = row
            if failures[owner] is not None:
                results[place] = {"failure": failures[owner]}
                continue
            if query_id not in queries:
                queries[query_id] = self._queries(query_id)
            query = queries[query_id]
            if not isinstance(query, EmbedInput):
                results[place] = {"failure": query}
                continue
            vision = visions[owner].get(segment)
            if vision is None and kind != "text":
                lost = CorruptMediaError(uri or "", f"there is no segment {segment}")
                results[place] = {"failure": failure_value(lost)}
                continue
            document = _document(text, vision, uri)
            pair = Pair(
                query,
                document,
                query.instruction,
                query_key=("query", query_id),
                document_key=("document", ordinals[owner], segment),
            )
            pairs.append((query_id, place, pair))
        pairs.sort(key=lambda one: one[:2])
        before = _counts(self._engine)
        for start in range(0, len(pairs), _MAX_PAIRS_A_CALL):
            chunk = pairs[start : start + _MAX_PAIRS_A_CALL]
            judged = self._engine.judge_pairs([pair for _, _, pair in chunk])
            for (_, place, _), result in zip(chunk, judged, strict=True):
                results[place] = _score_value(result)
        after = _counts(self._engine)
        return results, {name: after[name] - before[name] for name in after}


def _failed(medium: pa.Table, failure: Mapping[str, Any]) -> pa.Table:
    place = medium.column_names.index("_failure")
    return medium.set_column(place, "_failure", failures_array([failure]))


def _document(text: str | None, vision: Vision | None, uri: str | None) -> EmbedInput:
    return EmbedInput(
        texts=(text,) if text is not None else (),
        images=(vision,) if vision is not None and not vision.seconds else (),
        videos=(vision,) if vision is not None and vision.seconds else (),
        uri=uri or "",
    )


def _score_value(result: Any) -> dict[str, Any]:
    if isinstance(result, UnitError):
        return {"failure": failure_value(result) | {"stage": "rerank"}}
    return {
        "rerank_score": result.score,
        "num_tokens": result.num_tokens,
        "truncated": result.truncated,
    }


def _counts(engine: RerankerEngine) -> dict[str, int]:
    counts = engine.counts
    return {
        "visions": counts.num_visions,
        "visions_encoded": counts.num_visions_encoded,
        "tokens": counts.num_tokens,
        "prefix_tokens_saved": counts.prefix_tokens_saved,
    }


def _no_work(num_rows: int) -> list[dict[str, int]]:
    return [dict.fromkeys(_WORK, 0) for _ in range(num_rows)]


@dataclass(frozen=True, kw_only=True)
class WriteScores:
    """Scored media in, immutable fragments of scores and failure rows out; commits nothing."""

    root: str
    storage: Storage
    collection: str
    schemas: Mapping[str, pa.Schema]
    partitions: Mapping[str, str]
    run_id: str

    def __call__(self, blocks: Sequence[pa.Table], exclude: frozenset[int]) -> Written:
        media = pa.concat_tables(blocks)
        ordinals = media["_ordinal"].to_numpy()
        if exclude:
            keep = ~np.isin(ordinals, np.fromiter(exclude, np.int64))
            media, ordinals = media.filter(pa.array(keep)), ordinals[keep]
        stopped = pc.fill_null(
            pc.equal(pc.struct_field(media["_failure"], "stage"), NOT_STARTED["stage"]), False
        )
        not_started = media.filter(stopped)["_ordinal"].to_numpy()
        media = media.filter(pc.invert(stopped))
        pairs = _flat(media, "_pairs").append_column("_score", pc.list_flatten(media["_scores"]))
        lost = pc.is_valid(pc.struct_field(pairs["_score"], "failure"))
        now = dt.datetime.now(dt.UTC)
        scored, fragments = pairs.filter(pc.invert(lost)), {}
        for name in scored["_table"].unique().to_pylist():
            mine = scored.filter(pc.equal(scored["_table"], name))
            rows = self._rows(mine, self.schemas[name], now)
            fragments[name] = write_fragments(self.root, self.storage, name, rows)
        work = {name: pc.sum(pc.struct_field(media["_work"], name)).as_py() for name in _WORK}
        return Written(
            ordinals=ordinals,
            not_started=not_started,
            fragments=fragments,
            failures=self._failures(pairs.filter(lost), now),
            num_units=scored.num_rows,
            num_rows=scored.num_rows,
            num_tokens=work["tokens"] or 0,
            work={name: count or 0 for name, count in work.items()},
        )

    def _rows(self, pairs: pa.Table, target: pa.Schema, now: dt.datetime) -> pa.Table:
        made = {"run_id": self.run_id, "made_at": now, "rank_after": None}
        columns = []
        for one in target:
            if one.name in made:
                column = pa.repeat(pa.scalar(made[one.name], one.type), pairs.num_rows)
            elif schema.SCORE.get_field_index(one.name) >= 0:
                column = pc.struct_field(pairs["_score"], one.name)
            else:
                column = pairs[one.name]
            columns.append(column)
        return pa.Table.from_arrays(columns, schema=target)

    def _failures(self, pairs: pa.Table, now: dt.datetime) -> pa.Table:
        failure = pc.struct_field(pairs["_score"], "failure")
        partitions = [self.partitions[name] for name in pairs["_table"].to_pylist()]
        made = {"collection": self.collection, "run_id": self.run_id, "failed_at": now}
        columns = []
        for one in schema.FAILURES:
            if one.name in made:
                column = pa.repeat(pa.scalar(made[one.name], one.type), pairs.num_rows)
            elif one.name == "partition":
                column = pa.array(partitions, pa.string())
            elif one.name == "unit_id":
                column = pairs["pair_id"]
            elif one.name == "attempt":
                column = pc.add(pairs["_attempt"], pa.scalar(1, pa.int32()))
            elif schema.FAILURE.get_field_index(one.name) >= 0:
                column = pc.struct_field(failure, one.name)
            else:
                column = pairs[one.name]
            columns.append(column)
        return pa.Table.from_arrays(columns, schema=schema.FAILURES)


def _flat(table: pa.Table, column: str) -> pa.Table:
    """Return a list column's structs as a table of their own."""
    structs = pc.list_flatten(table[column]).combine_chunks()
    return pa.Table.from_arrays(structs.flatten(), names=[one.name for one in structs.type])
