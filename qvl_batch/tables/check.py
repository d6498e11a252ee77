"""Proof of a partition table: every unit once, every segment there, every file whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lance.file import LanceFileSession

from qvl_batch.tables.fragments import data_path, file_problem
from qvl_batch.tables.ledger import sql_text
from qvl_batch.tables.store import name_of, storage_error

# Kinds of problems; only `UNEXPECTED` is for information.
MISSING_FILE = "missing file"
WRONG_ROW_ID = "wrong row_id"
DOUBLED = "doubled"
INCOMPLETE = "incomplete"
CONTRADICTION = "contradiction"
LOST = "lost"
UNEXPECTED = "unexpected"

_BATCH_ROWS = 65_536
_URIS_A_QUERY = 500
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: what is wrong with which unit or file of which table."""

    kind: str
    table: str
    unit_id: str | None
    uri: str | None
    detail: str

    @property
    def is_error(self) -> bool:
        """False for what is only worth knowing."""
        return self.kind != UNEXPECTED

    def __str__(self) -> str:
        unit = f" unit {self.unit_id}" if self.unit_id else ""
        uri = f" ({self.uri})" if self.uri else ""
        return f"{self.table}:{unit}{uri} {self.kind}: {self.detail}"


def check_table(
    ds: lance.LanceDataset, expected_unit_ids: pa.Array | None, failed: pa.Array
) -> list[Problem]:
    """Return everything that is wrong with a table; nothing if all invariants hold.

    Files first: fragments of which a file is missing are not read, their units show up as lost.
    Then, per unit: a ``row_id`` other than ``unit_id:segment``, segments not exactly
    ``0 … num_segments - 1`` each once, rows that disagree on ``num_segments``. Then the expected
    units that neither have rows nor failed, and units that nobody expected.

    Args:
        expected_unit_ids: Strings; None: what should be there is not known.
        failed: unit_ids of the failures that count.

    Returns:
        At most one problem of a kind for a unit, by kind in the order above, then by unit_id.

    Raises:
        StorageError: If the table can not be read, or is damaged where its files are whole.

    Memory is about 60 bytes a row (2 million rows: 120 MB), whatever the width of the vectors.
    """
    table = name_of(ds)
    try:
        problems, whole = whole_fragments(ds, table)
        rows = _Rows.read(ds, whole)
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(ds.uri, error) from error
    problems += _check_row_ids(rows, table)
    problems += _check_segments(rows, table)
    if expected_unit_ids is not None:
        problems += _check_expected(rows.units, expected_unit_ids, failed, table)
    return _with_uris(ds, whole, problems)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the checks need of a table's rows: ``codes`` index into ``units``."""

    units: pa.Array
    codes: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    num_segments: npt.NDArray[np.int32]
    wrong_ids: list[tuple[str, str]]

    @classmethod
    def read(cls, ds: lance.LanceDataset, fragments: Sequence[lance.LanceFragment]) -> _Rows:
        ids, segments, nums, wrong = [], [], [], []
        columns = ["row_id", "unit_id", "segment", "num_segments"]
        if fragments:
            # Not ds.to_batches, which reads all fragments whatever it is told.
            scanner = ds.scanner(columns=columns, fragments=fragments, batch_size=_BATCH_ROWS)
            batches = scanner.to_batches()
        else:
            batches = iter(())
        for batch in batches:
            row_id, unit_id, segment, num = batch.columns
            expected = pc.binary_join_element_wise(unit_id, segment.cast(pa.string()), ":")
            bad = batch.filter(pc.not_equal(row_id, expected))
            wrong += zip(bad["unit_id"].to_pylist(), bad["row_id"].to_pylist(), strict=True)
            ids.append(unit_id)
            segments.append(segment.to_numpy())
            nums.append(num.to_numpy())
        none = np.empty(0, np.int32)
        encoded = pa.chunked_array(ids, pa.string()).combine_chunks().dictionary_encode()
        return cls(
            units=encoded.dictionary,
            codes=encoded.indices.to_numpy(),
            segments=np.concatenate([*segments, none]),
            num_segments=np.concatenate([*nums, none]),
            wrong_ids=wrong,
        )


def whole_fragments(
    ds: lance.LanceDataset, table: str
) -> tuple[list[Problem], list[lance.LanceFragment]]:
    """Return the missing files, and the fragments that have all of theirs."""
    files = LanceFileSession(ds.uri, storage_options=ds.latest_storage_options())

    def look(fragment: lance.LanceFragment) -> list[tuple[str, str]]:
        found = [
            (data_path(file), file_problem(files, data_path(file), file.file_size_bytes))
            for file in fragment.metadata.files
        ]
        deletions = fragment.deletion_file()
        if deletions is not None and not files.contains(deletions):
            found.append((deletions, "is missing"))
        return [(path, problem) for path, problem in found if problem]

    problems, whole = [], []
    fragments = ds.get_fragments()
    with ThreadPoolExecutor(8) as pool:
        for fragment, found in zip(fragments, pool.map(look, fragments), strict=True):
            rows = fragment.metadata.physical_rows
            problems += [
                Problem(MISSING_FILE, table, None, None, f"{path} {what}; it held {rows} rows")
                for path, what in found
            ]
            if not found:
                whole.append(fragment)
    return problems, whole


def _check_row_ids(rows: _Rows, table: str) -> Iterator[Problem]:
    by_unit: dict[str, list[str]] = {}
    for unit, row_id in rows.wrong_ids:
        by_unit.setdefault(unit, []).append(row_id)
    for unit, row_ids in sorted(by_unit.items()):
        text = f"row_id is not unit_id:segment: {_shown(sorted(row_ids))}"
        yield Problem(WRONG_ROW_ID, table, unit, None, text)


def _check_segments(rows: _Rows, table: str) -> Iterator[Problem]:
    if not len(rows.codes):
        return
    order = np.lexsort((rows.segments, rows.codes))
    codes, segments = rows.codes[order], rows.segments[order]
    nums = rows.num_segments[order]
    # Every code has a row, so its rows run from starts[code] to starts[code + 1].
    starts = np.searchsorted(codes, np.arange(len(rows.units)))
    ends = np.append(starts[1:], len(codes))
    fewest, most = np.minimum.reduceat(nums, starts), np.maximum.reduceat(nums, starts)
    same_unit = codes[1:] == codes[:-1]
    steps = np.ones(len(rows.units), bool)
    steps[codes[1:][same_unit & (np.diff(segments) != 1)]] = False
    good = steps & (segments[starts] == 0) & (fewest == most) & (ends - starts == most)
    bad = np.flatnonzero(~good)
    names = rows.units.take(pa.array(bad)).to_pylist()
    findings = []
    for unit, code in zip(names, bad, strict=True):
        mine = slice(starts[code], ends[code])
        findings += _unit_problems(unit, segments[mine], nums[mine], table)
    rank = [DOUBLED, INCOMPLETE, CONTRADICTION]
    yield from sorted(findings, key=lambda found: (rank.index(found.kind), found.unit_id))


def _unit_problems(
    unit: str, segments: npt.NDArray[np.int32], nums: npt.NDArray[np.int32], table: str
) -> Iterator[Problem]:
    present, counts = np.unique(segments, return_counts=True)
    stated = np.unique(nums)
    doubled = counts > 1
    if doubled.any():
        often = zip(present[doubled], counts[doubled], strict=True)
        text = _shown([f"{segment} ({count} times)" for segment, count in often])
        yield Problem(DOUBLED, table, unit, None, f"segments that stand more than once: {text}")
    if len(stated) > 1:
        text = f"its rows state different num_segments: {stated.tolist()}"
        yield Problem(CONTRADICTION, table, unit, None, text)
        return
    wanted = int(stated[0])
    inside = (present >= 0) & (present < wanted)
    num_missing = wanted - int(inside.sum())
    if num_missing:
        # The first missing ones lie below this bound, however large num_segments claims to be.
        bound = min(wanted, len(present) + _SHOWN + 1)
        missing = np.setdiff1d(np.arange(bound), present)
        text = f"{num_missing} of {wanted} segments are missing: {_shown(missing, num_missing)}"
        yield Problem(INCOMPLETE, table, unit, None, text)
    if not inside.all():
        text = f"segments outside 0..{wanted - 1}: {_shown(present[~inside])}"
        yield Problem(CONTRADICTION, table, unit, None, text)


def _check_expected(
    units: pa.Array, expected: pa.Array, failed: pa.Array, table: str
) -> Iterator[Problem]:
    expected, failed = _strings(expected), _strings(failed)
    settled = pa.concat_arrays([units, failed])
    lost = pc.unique(expected.filter(pc.invert(pc.is_in(expected, value_set=settled))))
    for unit in sorted(lost.to_pylist()):
        yield Problem(LOST, table, unit, None, "expected, but it has neither rows nor a failure")
    extra = units.filter(pc.invert(pc.is_in(units, value_set=expected)))
    for unit in sorted(extra.to_pylist()):
        yield Problem(UNEXPECTED, table, unit, None, "has rows, but is not expected")


def _with_uris(
    ds: lance.LanceDataset, fragments: Sequence[lance.LanceFragment], problems: list[Problem]
) -> list[Problem]:
    """Add the uri to every problem of a unit that has rows."""
    units = sorted({p.unit_id for p in problems if p.unit_id and p.kind != LOST})
    uris: dict[str, str | None] = {}
    for start in range(0, len(units), _URIS_A_QUERY):
        listed = ", ".join(sql_text(unit) for unit in units[start : start + _URIS_A_QUERY])
        found = ds.scanner(
            columns=["unit_id", "uri"], filter=f"unit_id IN ({listed})", fragments=list(fragments)
        ).to_table()
        uris |= zip(found["unit_id"].to_pylist(), found["uri"].to_pylist(), strict=True)
    return [replace(p, uri=uris.get(p.unit_id)) if p.unit_id in uris else p for p in problems]


def _strings(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array.cast(pa.string())


def _shown(items: Sequence[object], total: int | None = None) -> str:
    total = len(items) if total is None else total
    text = ", ".join(str(item) for item in items[:_SHOWN])
    return f"{text} and {total - _SHOWN} more" if total > _SHOWN else text
