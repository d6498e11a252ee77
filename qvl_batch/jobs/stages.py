"""The stages of the embed job: plain callables on Arrow tables, no Ray in sight.

Each returns one table per input table, one row a unit, in the order given: a replayed task must
deliver the same blocks again. What a unit can do wrong ends in its `_failure`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import budget, crash, schema
from qvl_batch.errors import QvlError, UnitError
from qvl_batch.jobs.deaths import Attempts, NoAttempts, run_carefully
from qvl_batch.jobs.parts import Part, iter_parts, parts_array
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher, FetchLimits, FetchRequest, Source
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage
from qvl_batch.tables.fragments import explode, failure_rows, write_fragments
from qvl_batch.units import EmbedInput, Engine, PartPlan

CountTokens = Callable[..., int]


def failure_value(error: UnitError) -> dict[str, Any]:
    """Return a `schema.FAILURE` value of an error."""
    return {
        "stage": error.stage,
        "error_type": type(error).__name__,
        "message": error.reason,
        "retryable": error.retryable,
    }


# The unit was handed out after the run was told to stop: it is neither done nor failed.
NOT_STARTED = {"stage": "stopped", "error_type": "", "message": "", "retryable": True}


@dataclass(frozen=True, kw_only=True)
class DecodeMedia:
    """Fetch, verify, decode and resize: units in, frames at their final size out.

    Args:
        storage: How object stores are reached.
        recipe: The budgets.
        fetch_limits: Bounds of reading.
        decode_limits: Bounds of the decoding process.
        resize: Import path of the frame resize, called in the decoding process.
        load_counter: Gives the function that counts a prompt's tokens; called once.
        may_start: Asked with the first ordinal of a block; False once the run is stopping.
        attempts: Knows on which blocks a worker has died.
        max_deaths: Deaths of workers after which the unit they had at hand fails.
    """

    storage: Storage
    recipe: Recipe
    fetch_limits: FetchLimits
    decode_limits: DecodeLimits
    resize: str
    load_counter: Callable[[], CountTokens]
    may_start: Callable[[int], bool] = lambda _: True
    attempts: Attempts = field(default_factory=NoAttempts)
    max_deaths: int = 3

    def open(self) -> DecodingWorker:
        """Start the decoding process and whatever lives as long as an actor does."""
        return DecodingWorker(self)


class DecodingWorker:
    """A `DecodeMedia` at work: owns the decoding process and the connections."""

    def __init__(self, stage: DecodeMedia) -> None:
        self._stage = stage
        self._fetcher = Fetcher(stage.storage, stage.fetch_limits)
        self._decoder = Decoder(stage.decode_limits, stage.resize)
        self._count_tokens = stage.load_counter()

    def close(self) -> None:
        self._decoder.close()

    def __call__(self, units: pa.Table) -> pa.Table:
        """Return `schema.decoded` of the units, in their order."""
        if units.num_rows and not self._stage.may_start(units["_ordinal"][0].as_py()):
            return _decoded(units, [_Decoded(failure=NOT_STARTED)] * units.num_rows)
        return run_carefully(
            units,
            "decode",
            lambda some: _decoded(some, list(self._decode_all(some))),
            lambda unit, failure: _decoded(unit, [_Decoded(failure=failure)]),
            self._stage.attempts,
            self._stage.max_deaths,
        )

    def _decode_all(self, units: pa.Table) -> Iterator[_Decoded]:
        rows = units.select(schema.MANIFEST.names).to_pylist()
        is_inline = [row["kind"] == "text" and row["text"] is not None for row in rows]
        requests = [
            FetchRequest(
                uri=row["uri"],
                etag=row["etag"],
                size_bytes=row["size_bytes"],
                byte_offset=row["byte_offset"],
                byte_length=row["byte_length"],
            )
            for row, inline in zip(rows, is_inline, strict=True)
            if not inline
        ]
        sources = self._fetcher.fetch_all(requests)
        for row, inline in zip(rows, is_inline, strict=True):
            if inline:
                yield _Decoded()
                continue
            source = next(sources)
            if isinstance(source, UnitError):
                yield _Decoded(failure=failure_value(source))
                continue
            with source:
                yield self._decode_one(row, source)

    def _decode_one(self, row: Mapping[str, Any], source: Source) -> _Decoded:
        recipe = self._stage.recipe
        crash.reached("mid-decode")
        try:
            header = self._decoder.open(source, row["kind"], dpi=recipe.document.dpi)
            if header.kind == "text":
                return _Decoded(text=self._decoder.text())
            plans = budget.plan_unit(
                header,
                recipe,
                budget.Context(self._counter_of(row), recipe.max_tokens),
                uri=row["uri"],
                fps=row["fps"],
                max_frames=row["max_frames"],
            )
            return _Decoded(parts=list(zip(plans, self._decoder.decode(plans), strict=True)))
        except UnitError as error:
            return _Decoded(failure=failure_value(error))

    def _counter_of(self, row: Mapping[str, Any]) -> Callable[[PartPlan], int]:
        def count(plan: PartPlan) -> int:
            return self._count_tokens(instruction=row["instruction"], plans=[plan])

        return count


@dataclass(frozen=True, slots=True)
class _Decoded:
    parts: Sequence[Part] = ()
    text: str | None = None
    failure: Mapping[str, Any] | None = None


def _decoded(units: pa.Table, outcomes: Sequence[_Decoded]) -> pa.Table:
    """Return `schema.decoded` of units and what became of them."""
    texts = [
        outcome.text if outcome.text is not None else given
        for outcome, given in zip(outcomes, units["text"].to_pylist(), strict=True)
    ]
    place = units.column_names.index("text")
    with_texts = units.set_column(place, units.schema.field("text"), pa.array(texts, "string"))
    return (
        with_texts.append_column(
            pa.field("_parts", pa.list_(schema.PART)),
            parts_array([outcome.parts for outcome in outcomes]),
        )
        .append_column(
            pa.field("_failure", schema.FAILURE),
            pa.array([outcome.failure for outcome in outcomes], schema.FAILURE),
        )
        .cast(schema.decoded(units.schema))
    )


class EmbedMedia:
    """Frames and texts in, encoded vectors out; owns the engine.

    An error of ours while loading is raised at the first call: an actor that dies in its
    constructor reaches the driver as a death, without its reason.

    Args:
        load: Gives the engine.
        attempts: Knows on which blocks a worker has died.
        max_deaths: Deaths of workers after which the unit they had at hand fails.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        attempts: Attempts = NoAttempts(),
        max_deaths: int = 3,
    ) -> None:
        self._attempts, self._max_deaths = attempts, max_deaths
        self._broken: QvlError | None = None
        try:
            self._engine = load()
        except QvlError as error:
            self._broken = error

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Return `schema.embedded` of the units, in their order."""
        if self._broken is not None:
            raise self._broken
        return run_carefully(
            decoded, "embed", self._embed, _not_embedded, self._attempts, self._max_deaths
        )

    def _embed(self, decoded: pa.Table) -> pa.Table:
        crash.reached("mid-embed")
        units = decoded.drop_columns(["_parts", "_failure"])
        inputs, owners, parts = _inputs_of(decoded)
        result = self._engine.embed(inputs) if inputs else None
        failures = decoded["_failure"].to_pylist()
        rows: list[list[dict[str, Any]]] = [[] for _ in range(units.num_rows)]
        of_unit: dict[int, int] = {}
        for i, (owner, part) in enumerate(zip(owners, parts, strict=True)):
            assert result is not None
            if i in result.failures:
                failures[owner] = failures[owner] or failure_value(result.failures[i])
                continue
            vectors = {name: _payload(values[i]) for name, values in result.columns.items()}
            rows[owner].append(
                part
                | vectors
                | {
                    "num_tokens": int(result.num_tokens[i]),
                    "truncated": bool(result.truncated[i]),
                }
            )
            of_unit[owner] = of_unit.get(owner, 0) + 1
        for owner, unit_rows in enumerate(rows):
            if failures[owner]:
                rows[owner] = []
            for row in unit_rows:
                row["num_segments"] = of_unit[owner]
        return (
            units.append_column(
                pa.field("_rows", pa.list_(schema.ROW)), pa.array(rows, pa.list_(schema.ROW))
            )
            .append_column(pa.field("_failure", schema.FAILURE), pa.array(failures, schema.FAILURE))
            .cast(schema.embedded(units.schema))
        )


def _not_embedded(unit: pa.Table, failure: dict[str, Any]) -> pa.Table:
    units = unit.drop_columns(["_parts", "_failure"])
    return (
        units.append_column(
            pa.field("_rows", pa.list_(schema.ROW)), pa.array([[]], pa.list_(schema.ROW))
        )
        .append_column(pa.field("_failure", schema.FAILURE), pa.array([failure], schema.FAILURE))
        .cast(schema.embedded(units.schema))
    )


def _payload(value: npt.NDArray[np.generic] | np.generic) -> bytes | float:
    return float(value) if np.ndim(value) == 0 else value.tobytes()


def _inputs_of(decoded: pa.Table) -> tuple[list[EmbedInput], list[int], list[dict[str, Any]]]:
    """Return one prompt a row-to-be, the position of its unit, and what is known of the row."""
    inputs, owners, known = [], [], []
    units = decoded.select(["uri", "kind", "text", "instruction", "_failure"]).to_pylist()
    for owner, (unit, parts) in enumerate(zip(units, iter_parts(decoded["_parts"]), strict=True)):
        if unit["_failure"] is not None:
            continue
        texts = (unit["text"],) if unit["text"] is not None else ()
        if unit["kind"] == "text":
            inputs.append(
                EmbedInput(texts=texts, instruction=unit["instruction"], uri=unit["uri"] or "")
            )
            owners.append(owner)
            known.append({"segment": 0})
        for part, vision in parts:
            inputs.append(
                EmbedInput(
                    texts=texts,
                    images=() if vision.seconds else (vision,),
                    videos=(vision,) if vision.seconds else (),
                    instruction=unit["instruction"],
                    uri=unit["uri"] or "",
                )
            )
            owners.append(owner)
            known.append(part)
    return inputs, owners, known


@dataclass(frozen=True, kw_only=True)
class WriteRows:
    """Embedded units in, immutable Lance fragments and failure rows out; commits nothing."""

    root: str
    storage: Storage
    collection: str
    schemas: Mapping[str, pa.Schema]
    partitions: Mapping[str, str]
    run_id: str

    def __call__(self, embedded: Sequence[pa.Table], exclude: frozenset[int]) -> Written:
        """Write one group of blocks.

        Args:
            embedded: Blocks of `schema.embedded`.
            exclude: Ordinals that this run has already received: left out.
        """
        units = pa.concat_tables(embedded)
        ordinals = units["_ordinal"].to_numpy()
        if exclude:
            keep = ~np.isin(ordinals, np.fromiter(exclude, np.int64))
            units, ordinals = units.filter(pa.array(keep)), ordinals[keep]
        stopped = pc.fill_null(
            pc.equal(pc.struct_field(units["_failure"], "stage"), NOT_STARTED["stage"]), False
        )
        not_started = units.filter(stopped)["_ordinal"].to_numpy()
        units = units.filter(pc.invert(stopped))
        now = dt.datetime.now(dt.UTC)
        fragments: dict[str, list[dict[str, Any]]] = {}
        done: dict[str, npt.NDArray[np.int64]] = {}
        failures = []
        num_rows = num_units = 0
        for name in units["_table"].unique().to_pylist():
            mine = units.filter(pc.equal(units["_table"], name))
            rows = explode(mine, self.schemas[name], run_id=self.run_id, embedded_at=now)
            if rows.num_rows:
                fragments[name] = write_fragments(self.root, self.storage, name, rows)
                done[name] = mine.filter(pc.is_null(mine["_failure"]))["_ordinal"].to_numpy()
                num_rows += rows.num_rows
            lost = failure_rows(
                mine,
                collection=self.collection,
                partition_json=self.partitions[name],
                run_id=self.run_id,
                failed_at=now,
            )
            num_units += mine.num_rows - lost.num_rows
            failures.append(lost)
        return Written(
            ordinals=ordinals,
            not_started=not_started,
            fragments=fragments,
            failures=pa.concat_tables(failures) if failures else schema.FAILURES.empty_table(),
            num_units=num_units,
            num_rows=num_rows,
            num_tokens=_total_tokens(units),
            done=done,
        )


def _total_tokens(units: pa.Table) -> int:
    tokens = pc.struct_field(pc.list_flatten(units["_rows"]), "num_tokens")
    return pc.sum(tokens).as_py() or 0


@dataclass(frozen=True, kw_only=True)
class Written:
    """What one group of blocks became: fragments by table, not yet visible, and failures.

    `ordinals` are all units of the group; those in `not_started` are neither done nor failed.
    `done` has those whose rows are in a table's fragments; a table it does not name has them all.
    `work` counts what it took, by name.
    """

    ordinals: npt.NDArray[np.int64]
    not_started: npt.NDArray[np.int64]
    fragments: Mapping[str, Sequence[Mapping[str, Any]]]
    failures: pa.Table
    num_units: int
    num_rows: int
    num_tokens: int
    done: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    work: Mapping[str, int] = field(default_factory=dict)
