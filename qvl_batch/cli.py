"""The `qvl-batch` command. Every command prints one clear line and an exit code for an error.

Exit codes: 0 ok, 1 run failed or invariant broken, 2 bad input or configuration, 3 another run
holds the partition, 130/143 stopped by Ctrl-C/SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvl_batch import __version__
from qvl_batch.cli_options import EndpointUrl, Json, Region, Root, Set, Steal
from qvl_batch.cli_upkeep import upkeep
from qvl_batch.errors import ConfigError, QvlError
from qvl_batch.storage import Storage

app = typer.Typer(
    name="qvl-batch",
    help="Turn a bucket of media into searchable, quantised Qwen3-VL vectors, nothing lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def manifest(
    source: Annotated[str, typer.Argument(help="Folder, s3://bucket/prefix, glob, or a list.")],
    out: Annotated[str, typer.Argument(help="Parquet file to write.")],
    sniff: Annotated[bool, typer.Option(help="Read first bytes on object stores too.")] = False,
    partition_by: Annotated[
        str | None,
        typer.Option(
            help="hive, none, mtime, mtime:%Y-%m, column:NAME[,NAME] or regex:PATTERN; "
            "without it, hive where there are key=value folders."
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """List the media of SOURCE into a manifest; what is left out is named with its reason."""
    from qvl_batch.media.manifest import build_manifest, parse_partition_rule

    report = build_manifest(
        source,
        out,
        storage=Storage.of(endpoint_url=endpoint_url, region=region),
        sniff=sniff,
        partition_from=parse_partition_rule(partition_by) if partition_by else None,
    )
    print(report)


@app.command()
def init(
    out: Annotated[Path | None, typer.Argument(help="File to write; JOB.yaml by default.")] = None,
    job: Annotated[str, typer.Option(help="embed or rerank.")] = "embed",
    manifest: Annotated[str, typer.Option(help="Manifest to embed.")] = "manifest.parquet",
    queries: Annotated[str, typer.Option(help="Queries to rerank for.")] = "queries.jsonl",
    root: Annotated[str, typer.Option(help="LanceDB directory to name in it.")] = "vectors",
    model: Annotated[
        str | None, typer.Option(help="Model to name in it; Qwen3-VL's 2B by default.")
    ] = None,
) -> None:
    """Write a commented configuration with every key and its default."""
    from qvl_batch.config import commented_yaml
    from qvl_batch.rerank_config import commented_rerank_yaml

    if job == "embed":
        path = model or "Qwen/Qwen3-VL-Embedding-2B"
        text = commented_yaml(
            {"input": {"manifest": manifest}, "output": {"root": root}, "model": {"path": path}}
        )
    elif job == "rerank":
        path = model or "Qwen/Qwen3-VL-Reranker-2B"
        text = commented_rerank_yaml(
            {"input": {"queries": queries}, "search": {"root": root}, "model": {"path": path}}
        )
    else:
        raise ConfigError(f"--job is {job!r}.", "Give embed or rerank.")
    out = out or Path(f"{job}.yaml")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out} exists.", "Give another name, or remove it.") from None
    except OSError as error:
        raise ConfigError(f"{out} can not be written: {error.strerror}.", "") from None
    print(f"wrote {out}; next: qvl-batch {job} {out}")


@app.command()
def embed(
    config: Annotated[str, typer.Argument(help="Configuration file (qvl-batch init writes one).")],
    set_: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N units.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed for good, too.")
    ] = False,
    steal: Steal = False,
) -> None:
    """Embed what is left of a manifest into LanceDB tables; run it again to continue."""
    from qvl_batch.config import load_config
    from qvl_batch.jobs.embed import run_embed

    overrides = [*(set_ or []), *([f"input.limit={limit}"] if limit is not None else [])]
    report = run_embed(load_config(config, overrides), retry_failed=retry_failed, steal=steal)
    raise typer.Exit(report.exit_code)


@app.command()
def rerank(
    config: Annotated[str, typer.Argument(help="Configuration (qvl-batch init --job rerank).")],
    set_: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N queries.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed for good, too.")
    ] = False,
    steal: Steal = False,
) -> None:
    """Find candidates for queries and score them into tables; run it again to continue."""
    from qvl_batch.jobs.rerank import run_rerank
    from qvl_batch.rerank_config import load_rerank_config

    overrides = [*(set_ or []), *([f"input.limit={limit}"] if limit is not None else [])]
    report = run_rerank(
        load_rerank_config(config, overrides), retry_failed=retry_failed, steal=steal
    )
    raise typer.Exit(report.exit_code)


@app.command()
def search(
    root: Root,
    text: Annotated[str | None, typer.Argument(help="What is asked, in words.")] = None,
    image: Annotated[str | None, typer.Option(help="Picture: a path or an address.")] = None,
    video: Annotated[str | None, typer.Option(help="Clip: a path or an address.")] = None,
    like: Annotated[str | None, typer.Option(help="More like this row_id.")] = None,
    collection: Annotated[str | None, typer.Option(help="Or an alias.")] = None,
    partition: Annotated[
        list[str] | None, typer.Option(help="Only these tables: --partition dt=2026-01-01.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only these rows: --where kind=image,video --where text~circle."),
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Further column in --json.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many hits.")] = 10,
    rerank: Annotated[
        str | None, typer.Option(help="Reranking checkpoint that looks at the hits again.")
    ] = None,
    rerank_top: Annotated[int, typer.Option(min=1, help="How many hits it looks at.")] = 100,
    model: Annotated[
        str | None, typer.Option(help="Where the checkpoint of the tables lies here.")
    ] = None,
    json: Json = False,
    html: Annotated[str | None, typer.Option(help="Also write a page with the media.")] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Search the tables by text, picture, clip, a mix of them, or a row."""
    from qvl_batch.api.connect import connect
    from qvl_batch.api.search_command import SearchRequest, run_search

    request = SearchRequest(
        text=text,
        image=image,
        video=video,
        like=like,
        partitions=partition or (),
        where=where or (),
        columns=column or (),
        top_k=top_k,
        rerank=rerank,
        rerank_top=rerank_top,
    )
    storage = Storage.of(endpoint_url=endpoint_url, region=region)
    with connect(root, storage=storage, model=model) as tables:
        run_search(tables, collection, request, as_json=json, html=html, storage=storage)


@app.command()
def alias(
    root: Root,
    name: Annotated[str | None, typer.Argument(help="The alias.")] = None,
    collection: Annotated[str | None, typer.Argument(help="What it stands for from now.")] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """List the aliases, or let one stand for a collection in one commit."""
    from qvl_batch.api.connect import connect

    tables = connect(root, storage=Storage.of(endpoint_url=endpoint_url, region=region))
    if name is not None and collection is None:
        raise ConfigError(f"What shall {name!r} stand for?", "Give ROOT ALIAS COLLECTION.")
    if name is not None and collection is not None:
        before = tables.aliases().get(name)
        tables.switch_alias(name, collection)
        print(f"{name}: {collection}" + (f" (was {before})" if before else ""))
        return
    for known, stands_for in tables.aliases().items():
        print(f"{known}: {stands_for}")


@app.command()
def compare(
    root: Root,
    first: Annotated[str, typer.Argument(help="A collection or an alias.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    queries: Annotated[str, typer.Option(help="JSONL, CSV or Parquet: text, image or video.")],
    relevance: Annotated[
        str | None, typer.Option(help="Labels: query_id, relevance, and row_id, media_id or uri.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many hits are compared.")] = 10,
    json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Ask two collections the same: how far they agree, and with labels which is better."""
    from rich.console import Console

    from qvl_batch.api.compare_collections import compare_lists
    from qvl_batch.api.connect import connect

    storage = Storage.of(endpoint_url=endpoint_url, region=region)
    with connect(root, storage=storage) as tables:
        found = compare_lists(
            tables, first, second, queries, relevance, top_k=top_k, storage=storage
        )
    if json:
        print(found.to_json())
    else:
        Console().print(found.table())


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Folder of an embedding checkpoint.")],
    golden: Annotated[str, typer.Option(help="Folder of golden outputs.")],
    reranker: Annotated[str | None, typer.Option(help="Folder of a reranking checkpoint.")] = None,
    json: Json = False,
) -> None:
    """Compare our vectors with stored outputs of the official code, case by case."""
    from qvl_batch.api.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(model, golden, reranker, json))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for media, manifest and tables.")] = Path(
        "qvl-demo"
    ),
) -> None:
    """Draw a small corpus, embed it on local Ray, search it, rerank, and write a gallery page."""
    from qvl_batch.demo.run import run_demo

    raise typer.Exit(run_demo(out))


app.add_typer(upkeep)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors of ours become one line on stderr and an exit code."""
    # A run takes the signal over to end in good order; before and after it nothing is to be saved.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app(args=arguments, prog_name="qvl-batch")
    except QvlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
