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

EndpointUrl = Annotated[
    str | None, typer.Option(help="S3 endpoint other than Amazon's (or AWS_ENDPOINT_URL).")
]
Region = Annotated[str | None, typer.Option(help="S3 region.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set recipe.dim=512.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N units.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed for good, too.")
    ] = False,
) -> None:
    """Embed what is left of a manifest into LanceDB tables; run it again to continue."""
    from qvl_batch.config import load_config
    from qvl_batch.jobs.embed import run_embed

    overrides = [*(set_ or []), *([f"input.limit={limit}"] if limit is not None else [])]
    report = run_embed(load_config(config, overrides), retry_failed=retry_failed)
    raise typer.Exit(report.exit_code)


@app.command()
def rerank(
    config: Annotated[str, typer.Argument(help="Configuration (qvl-batch init --job rerank).")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set search.top_k=20.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N queries.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed for good, too.")
    ] = False,
) -> None:
    """Find candidates for queries and score them into tables; run it again to continue."""
    from qvl_batch.jobs.rerank import run_rerank
    from qvl_batch.rerank_config import load_rerank_config

    overrides = [*(set_ or []), *([f"input.limit={limit}"] if limit is not None else [])]
    report = run_rerank(load_rerank_config(config, overrides), retry_failed=retry_failed)
    raise typer.Exit(report.exit_code)


@app.command()
def verify(
    root: Annotated[str, typer.Argument(help="output.root of the runs.")],
    manifest: Annotated[str | None, typer.Option(help="The manifest that was embedded.")] = None,
    collection: Annotated[str | None, typer.Option(help="Where the root holds several.")] = None,
    partition_by: Annotated[
        str | None, typer.Option(help="Comma-separated columns, as output.partition_by had them.")
    ] = None,
    json: Json = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
) -> None:
    """Prove that every unit is done or failed, none twice, every segment and file there."""
    from qvl_batch.jobs.verify import verify as run_verify

    report = run_verify(
        root,
        Storage.of(endpoint_url=endpoint_url, region=region),
        manifest=manifest,
        collection=collection,
        partition_by=partition_by.split(",") if partition_by else None,
    )
    print(report.to_json() if json else report)
    raise typer.Exit(1 if report.problems else 0)


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
