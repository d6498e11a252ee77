"""An embed run before Ray starts: everything checked, leased, planned."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from qvl_batch import crash, schema
from qvl_batch.api.certificate import Certificate
from qvl_batch.api.parity import check_stack
from qvl_batch.config import EmbedConfig
from qvl_batch.errors import ConfigError
from qvl_batch.jobs.checkpoint import Model, QwenCheckpoint
from qvl_batch.jobs.commit_loop import Tables
from qvl_batch.jobs.identify import Units, identify
from qvl_batch.jobs.leasing import new_run_id, refuse_open_replaces, take_leases
from qvl_batch.jobs.manifest import Manifest, read_manifest
from qvl_batch.jobs.modes import Appending, Replacing, Target, Upserting
from qvl_batch.jobs.plan import Plan, plan_units
from qvl_batch.jobs.stale import Stale, find_stale
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage
from qvl_batch.tables import staging
from qvl_batch.tables.aliases import refuse_alias
from qvl_batch.tables.embedding_metadata import embedding_functions
from qvl_batch.tables.layout import Partition, check_collection_name, partition_json
from qvl_batch.tables.lease import Leases
from qvl_batch.tables.ledger import check_recipe as check_table_recipe
from qvl_batch.tables.rewrite import fence, replace_units
from qvl_batch.tables.store import TableStore


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """An embed run with everything decided: nothing is left to be wrong but the world.

    ``staged`` has what open replaces have finished, by table (None in other modes); ``to_fence``
    the tables that were not there when their lease was taken over from a dead run.
    """

    config: EmbedConfig
    run_id: str
    storage: Storage
    store: TableStore
    model: Model
    recipe: Recipe
    units: Units
    plan: Plan
    schemas: Mapping[str, pa.Schema]
    leases: Leases
    target: Target
    staged: Mapping[str, staging.Staged] | None
    stale: Stale | None
    to_fence: Sequence[str]
    certificate: Certificate | None = None
    staging_versions: dict[str, int] = field(default_factory=dict)

    def commits(self) -> Tables:
        """Return where the rows of this run go, by its mode."""
        if self.staged is not None:
            tables = {partition_json(p): name for name, p in self.plan.partitions.items()}
            ids = self.plan.todo["unit_id"].combine_chunks()
            return Replacing(self.target, ids, tables, self.staging_versions)
        if self.stale is not None:
            return Upserting(self.target, self.stale.replaced)
        return Appending(self.target)

    def make_ready(self, tables: Sequence[str]) -> None:
        """Open the replaces of these tables, and fence those that were created just now."""
        for name in tables:
            if name in self.to_fence:
                fence(self.store, name, run_id=self.run_id)
            if self.staged is not None and not self.staged[name].session:
                begun = staging.begin(
                    self.store,
                    name,
                    session=self.run_id,
                    digest=self.staged[name].digest,
                    base_version=self.target.planned_version(name),
                    run_id=self.run_id,
                    still_held=self.leases.check,
                )
                self.staging_versions[name] = begun.version

    def remove_left_over(self) -> None:
        """Take away older states of media whose newer state is there already."""
        for name, units in sorted(self.stale.left_over.items() if self.stale else ()):
            replace_units(
                self.store,
                name,
                [],
                units,
                marker=f"{self.run_id}/left-over/{name}",
                run_id=self.run_id,
                planned_version=self.target.planned_version(name),
            )


def prepare(
    config: EmbedConfig,
    held: contextlib.ExitStack,
    *,
    model: Model | None = None,
    retry_failed: bool = False,
    steal: bool = False,
) -> EmbedJob:
    """Check everything that can be checked before Ray starts, take the leases, and plan.

    Args:
        config: The job.
        held: Gets the leases: closing it releases them.
        model: Another model than the configured checkpoint.
        retry_failed: Plan again also what failed for good.
        steal: Take leases over from whoever holds them.

    Raises:
        InputError: If anything in the configuration, the manifest, the model, the storage or the
            existing tables does not go together, or if this installation gives other vectors than
            it should.
        LeaseHeldError: If another live run works on one of the partitions.
    """
    storage = config.storage.to_storage()
    collection = config.output.collection
    check_collection_name(collection)
    replaces = config.output.mode == "replace"
    if replaces and config.input.limit is not None:
        raise ConfigError(
            "input.limit is set with output.mode replace, which publishes whole partitions.",
            "Leave the limit out, or use another mode.",
        )
    manifest = read_manifest(config.input.manifest, storage, config.output.partition_by)
    units = identify(manifest, collection)
    store = TableStore(config.output.root, storage)
    store.check_writable()
    refuse_alias(store, collection)
    model = model or QwenCheckpoint.of(config.model, storage, config.pools.embed.batch_tokens)
    recipe = config.build_recipe(model.digest(), model.dim())
    check_recipe(store, collection, recipe)
    run_id = new_run_id()
    leases, to_fence = take_leases(
        store, units.tables, run_id, held, ttl_s=config.commit.lease_ttl_s, steal=steal
    )
    staged = _open_replaces(store, units, recipe) if replaces else None
    if not replaces:
        refuse_open_replaces(store, units.tables)
    plan = plan_units(
        units,
        store,
        collection,
        extra_fields=manifest.extra_fields,
        num_manifest_rows=manifest.rows.num_rows,
        retry_failed=retry_failed,
        max_attempts=config.limits.max_attempts,
        limit=config.input.limit,
        staged=staged,
    )
    certificate = certify(config, model) if plan.todo.num_rows else None
    schemas = _schemas(manifest, collection, recipe, model, certificate, plan.partitions)
    for name in plan.planned_versions:
        # Also checks that the manifest's own columns are those of the earlier runs.
        store.create(name, schemas[name])
    crash.reached("after-plan")
    return EmbedJob(
        config=config,
        run_id=run_id,
        storage=storage,
        store=store,
        model=model,
        recipe=recipe,
        units=units,
        plan=plan,
        schemas=schemas,
        leases=leases,
        target=Target(
            store=store,
            run_id=run_id,
            planned_versions=plan.planned_versions,
            still_held=leases.check,
        ),
        staged=staged,
        stale=find_stale(units, plan, store) if config.output.mode == "upsert" else None,
        to_fence=to_fence,
        certificate=certificate,
        staging_versions={name: one.version for name, one in (staged or {}).items()},
    )


def _open_replaces(store: TableStore, units: Units, recipe: Recipe) -> dict[str, staging.Staged]:
    """Return what open replaces of the same content have finished; empty ones for the rest."""
    present = set(store.names())
    found = {}
    for name in units.tables:
        digest = staging.digest_of(recipe.recipe_id, units.ids_of(name))
        open_one = staging.read(store, name) if staging.PREFIX + name in present else None
        if open_one is None or open_one.digest != digest:
            open_one = staging.nothing(digest)
        found[name] = open_one
    return found


def _schemas(
    manifest: Manifest,
    collection: str,
    recipe: Recipe,
    model: Model,
    certificate: Certificate | None,
    partitions: Mapping[str, Partition],
) -> dict[str, pa.Schema]:
    stated = model.stated()
    stated |= embedding_functions(recipe, stated)
    if certificate:
        stated |= {"qvl.certificate": certificate.sha256}
    own = [f for f in manifest.extra_fields if f.name not in schema.MANIFEST.names]
    return {
        name: schema.table_rows(
            recipe,
            own,
            {"qvl.collection": collection, "qvl.partition": partition_json(partition)} | stated,
        )
        for name, partition in partitions.items()
    }


def certify(config: EmbedConfig, model: Model) -> Certificate | None:
    """Return the certificate of this installation; None if it is not asked for.

    It is about the path of Qwen3-VL checkpoints: another model has another path.

    Raises:
        ModelError: If the installation is broken, naming what differs.
    """
    return check_stack() if config.model.check and isinstance(model, QwenCheckpoint) else None


def check_recipe(store: TableStore, collection: str, recipe: Recipe) -> None:
    """Refuse a collection that was made by another recipe.

    One table tells: none is added to a collection without this check. The tables that a run
    writes to are each compared again when their columns are.

    Raises:
        RecipeMismatchError: Naming the fields that differ.
    """
    for name in store.names():
        if name == collection or name.startswith(f"{collection}__"):
            dataset = store.open(name)
            if dataset is not None:
                check_table_recipe(dataset, recipe)
                return
