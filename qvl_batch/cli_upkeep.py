"""The commands that look after tables: prove, index, compact, clean, take away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvl_batch.cli_options import (
    Collection,
    EndpointUrl,
    Json,
    Partition,
    Region,
    Root,
    Set,
    Steal,
)
from qvl_batch.errors import ConfigError
from qvl_batch.storage import Storage

upkeep = typer.Typer()


@upkeep.command()
def verify(
    root: Root,
    manifest: Annotated[str | None, typer.Option(help="The manifest that was embedded.")] = None,
    collection: Annotated[str | None, typer.Option(help="Where the root holds several.")] = None,
    partition_by: Annotated[
        str | None, typer.Option(help="Comma-separated columns, as output.partition_by had them.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every data file and compare its hash.")
    ] = False,
    rebuild_catalog: Annotated[
        bool, typer.Option("--rebuild-catalog", help="Write the catalog anew from the tables.")
    ] = False,
    json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Prove that every unit is done or failed, none twice, every segment and file there."""
    from qvl_batch.jobs.verify import verify as run_verify

    storage = Storage.of(endpoint_url=endpoint_url, region=region)
    if rebuild_catalog:
        from qvl_batch.jobs.integrity import run_rebuild_catalog

        run_rebuild_catalog(root, storage, echo=_nowhere if json else print)
    report = run_verify(
        root,
        storage,
        manifest=manifest,
        collection=collection,
        partition_by=partition_by.split(",") if partition_by else None,
        deep=deep,
    )
    print(report.to_json() if json else report)
    raise typer.Exit(1 if report.problems else 0)


@upkeep.command()
def index(
    root: Root,
    collection: Collection = None,
    partition: Partition = None,
    recall: Annotated[
        float, typer.Option(help="Least share of the exhaustive top 10 that an index must find.")
    ] = 0.99,
    max_nprobes: Annotated[
        int | None, typer.Option(help="Most lists that a query may read; without it a quarter.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Work here, without Ray.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster (or RAY_ADDRESS); a local one without it.")
    ] = None,
    json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Build or refresh the indexes of tables; publish those whose measured recall suffices."""
    from qvl_batch.jobs.index import run_index
    from qvl_batch.tables.index import IndexRules

    report = run_index(
        root,
        Storage.of(endpoint_url=endpoint_url, region=region),
        collection=collection,
        where=partition or [],
        rules=IndexRules(recall=recall, max_nprobes=max_nprobes),
        local=local,
        address=address,
        echo=_nowhere if json else print,
    )
    print(report.to_json() if json else report)
    raise typer.Exit(report.exit_code)


@upkeep.command()
def compact(
    root: Root,
    collection: Collection = None,
    partition: Partition = None,
    steal: Steal = False,
    json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Write many small files of a table anew as few large ones; its rows and indexes stay."""
    from qvl_batch.jobs.maintenance import run_compact

    report = run_compact(
        root,
        Storage.of(endpoint_url=endpoint_url, region=region),
        collection=collection,
        where=partition or [],
        steal=steal,
        echo=_nowhere if json else print,
    )
    print(report.to_json() if json else report)
    raise typer.Exit(report.exit_code)


@upkeep.command()
def gc(
    root: Root,
    older_than: Annotated[
        str, typer.Option(help="Longer than any run takes: 7d, 36h; at least 1h.")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    give_up: Annotated[
        list[str] | None,
        typer.Option(help="First give up the unfinished replace of this table."),
    ] = None,
    steal: Steal = False,
    json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Remove old versions of tables, and files that no version refers to."""
    from qvl_batch.jobs import maintenance

    storage = Storage.of(endpoint_url=endpoint_url, region=region)
    echo = _nowhere if json else print
    for table in give_up or []:
        maintenance.give_up(root, storage, table, steal=steal, echo=echo)
    report = maintenance.run_gc(
        root,
        storage,
        older_than=maintenance.parse_age(older_than),
        dry_run=dry_run,
        echo=echo,
    )
    print(report.to_json() if json else report)
    raise typer.Exit(report.exit_code)


@upkeep.command()
def prune(
    config: Annotated[str, typer.Argument(help="Configuration of the embed job.")],
    set_: Set = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also where more than 10 % of a partition would go.")
    ] = False,
    steal: Steal = False,
) -> None:
    """Remove from a manifest's partitions the units that it does not list any more."""
    from qvl_batch.config import load_config
    from qvl_batch.jobs.prune import run_prune

    run_prune(load_config(config, set_ or []), yes=yes, steal=steal)


@upkeep.command()
def delete(
    root: Root,
    uri: Annotated[list[str] | None, typer.Option(help="A medium; may be repeated.")] = None,
    uris: Annotated[Path | None, typer.Option(help="File with a uri a line.")] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Remove old versions too, whatever their age.")
    ] = False,
    steal: Steal = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Remove all rows of media from every table under ROOT, and their bytes from its files."""
    from qvl_batch.jobs.delete import run_delete

    listed = list(uri or [])
    if uris is not None:
        try:
            listed += uris.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{uris} can not be read: {error}.", "Give a uri a line.") from None
    storage = Storage.of(endpoint_url=endpoint_url, region=region)
    run_delete(root, storage, listed, now=now, steal=steal)


def _nowhere(_: str) -> None:
    """Take a line for a person where only JSON is wanted."""
