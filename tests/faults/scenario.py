"""One case of the crash matrix: a state before, a run that is killed, runs again, what is left."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables import catalog
from qvl_batch.tables.store import TableStore
from qvl_batch.units import media_id, unit_id

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
# `late-upsert`: an append has put the new state beside the old one, an upsert takes the old away.
MODES = ("append", "upsert", "late-upsert", "replace", "prune", "delete", "index", "compact")
UNITS_A_DAY = 24


@dataclass(frozen=True)
class Unit:
    uri: str
    etag: str
    day: str

    @property
    def unit_id(self) -> str:
        return unit_id(media_id(self.uri), self.etag)

    @property
    def is_bad(self) -> bool:
        return self.uri.endswith("bad")


@dataclass(frozen=True)
class Outcome:
    """How a case ended: 0 lost, 0 duplicated and no problem is what must be."""

    lost: int
    duplicated: int
    foreign: int
    problems: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        return not (self.lost or self.duplicated or self.foreign or self.problems)


def units(variant: int) -> dict[str, list[Unit]]:
    """Return both states of the bucket, ``before`` and ``after``, in one of many variants."""
    rng = random.Random(variant)
    before = units_before(rng)
    return {"before": before, "after": units_after(before, rng)}


def units_before(rng: random.Random) -> list[Unit]:
    """Return the first state of the bucket: three days of images, one in ten of them bad."""
    return [
        Unit(f"/media/{day}/{n}{'-bad' if rng.random() < 0.1 else ''}", "v1", day)
        for day in DAYS
        for n in range(UNITS_A_DAY)
    ]


def units_after(before: list[Unit], rng: random.Random) -> list[Unit]:
    """Return the next state: a quarter changed, a tenth gone, a few new ones a day."""
    kept = [
        Unit(u.uri, "v2" if rng.random() < 0.25 else u.etag, u.day)
        for u in before
        if rng.random() > 0.1
    ]
    return kept + [Unit(f"/media/{day}/new-{n}", "v1", day) for day in DAYS for n in range(3)]


def write_manifest(path: Path, units: list[Unit], kinds: list[str] | None = None) -> None:
    """Write a manifest that is partitioned by day; all are images where no kinds are given."""
    rows = pa.table(
        {
            "uri": [u.uri for u in units],
            "kind": kinds or ["image"] * len(units),
            "etag": [u.etag for u in units],
            "dt": [u.day for u in units],
        },
        metadata={"qvl.partition_by": '["dt"]'},
    )
    pq.write_table(rows, path)


def write_config(path: Path, manifest: Path, root: str, storage: Storage, mode: str) -> None:
    """Write a configuration with small blocks and a commit after each of them."""
    values: dict[str, Any] = {
        "input": {"manifest": str(manifest)},
        "output": {"root": root, "mode": mode},
        "model": {"path": "hash", "check": False},
        "recipe": {"dim": 16},
        "pools": {"units_per_block": 8},
        "commit": {"interval_s": 0.01, "lease_ttl_s": 5.0},
        "storage": {"endpoint_url": storage.endpoint_url, "region": storage.region},
    }
    path.write_text(yaml.safe_dump(values))


def table_of(day: str) -> str:
    return f"media__dt-{day}"


def expected_units(before: list[Unit], after: list[Unit], mode: str) -> dict[str, set[str]]:
    """Return the unit_ids that each day's table must hold in the end."""
    found: dict[str, set[str]] = {day: set() for day in DAYS}
    for unit in after:
        if not unit.is_bad:
            found[unit.day].add(unit.unit_id)
    now = {unit.uri for unit in after}
    for unit in before:
        gone = mode.endswith("upsert") and unit.uri in now
        stays = mode not in ("replace", "prune", "delete") and not gone
        if stays and not unit.is_bad:
            found[unit.day].add(unit.unit_id)
    return found


def outcome(
    root: str, storage: Storage, manifest: Path, before: list[Unit], after: list[Unit], mode: str
) -> Outcome:
    """Compare what the tables hold with what they must hold, and have them verified."""
    store = TableStore(root, storage)
    lost = duplicated = foreign = 0
    for day, wanted in expected_units(before, after, mode).items():
        dataset = store.open(table_of(day))
        rows = dataset.to_table(columns=["unit_id"])["unit_id"].to_pylist() if dataset else []
        counts = Counter(rows)
        lost += len(wanted - counts.keys())
        foreign += len(counts.keys() - wanted)
        duplicated += sum(n - 1 for n in counts.values())
    problems = [str(p) for p in verify(root, storage, manifest=str(manifest)).problems]
    if mode == "index":
        rows = catalog.read(store).to_pylist()
        problems += [f"{row['table']} has no index" for row in rows if row["index"] is None]
    if mode == "compact":
        datasets = {day: store.open_existing(table_of(day)) for day in DAYS}
        problems += [
            f"{d} is not compact" for d, t in datasets.items() if len(t.get_fragments()) > 1
        ]
    return Outcome(lost, duplicated, foreign, tuple(problems))
