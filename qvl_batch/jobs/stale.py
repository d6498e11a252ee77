"""Rows that a manifest has overtaken: older states of its media, and units that left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.jobs.identify import Units
from qvl_batch.jobs.plan import Plan
from qvl_batch.tables.ledger import units_of_media
from qvl_batch.tables.store import TableStore


@dataclass(frozen=True, kw_only=True)
class Stale:
    """What an upsert takes away.

    Args:
        replaced: Per table, by ordinal of the new unit, the unit_ids of the medium's older states:
            their rows go when the new ones come.
        left_over: Per table, older states of media whose new state is there already.
    """

    replaced: Mapping[str, Mapping[int, list[str]]]
    left_over: Mapping[str, list[str]]


def find_stale(units: Units, plan: Plan, store: TableStore) -> Stale:
    """Return which rows of the planned tables belong to older states of the manifest's media.

    A medium whose new state failed, or is held back by a limit, keeps its old rows.
    """
    replaced: dict[str, dict[int, list[str]]] = {}
    left_over: dict[str, list[str]] = {}
    ordinals = dict(
        zip(plan.todo["unit_id"].to_pylist(), plan.todo["_ordinal"].to_pylist(), strict=True)
    )
    for name in units.tables:
        dataset = store.open(name)
        if dataset is None:
            continue
        held = units_of_media(dataset)
        listed = units.ids_of(name)
        foreign = held.filter(pc.invert(pc.is_in(held["unit_id"], value_set=listed)))
        place = pc.index_in(foreign["media_id"], value_set=units.media_ids(units.of_table(name)))
        known = pc.is_valid(place)
        old = foreign["unit_id"].filter(known).to_pylist()
        new = listed.take(place.filter(known).combine_chunks()).to_pylist()
        done = set(held["unit_id"].filter(pc.is_in(held["unit_id"], value_set=listed)).to_pylist())
        for old_unit, new_unit in zip(old, new, strict=True):
            if new_unit in done:
                left_over.setdefault(name, []).append(old_unit)
            elif new_unit in ordinals:
                table = replaced.setdefault(name, {})
                table.setdefault(ordinals[new_unit], []).append(old_unit)
    return Stale(replaced=replaced, left_over=left_over)


def find_unlisted(units: Units, store: TableStore) -> dict[str, tuple[pa.Array, int]]:
    """Return, per table, the units that are not in the manifest, and how many units there are."""
    found = {}
    for name in units.tables:
        dataset = store.open(name)
        if dataset is None:
            continue
        held = units_of_media(dataset)["unit_id"].combine_chunks()
        unlisted = held.filter(pc.invert(pc.is_in(held, value_set=units.ids_of(name))))
        if len(unlisted):
            found[name] = (unlisted, len(held))
    return found
