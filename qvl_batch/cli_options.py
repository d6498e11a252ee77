"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

EndpointUrl = Annotated[
    str | None, typer.Option(help="S3 endpoint other than Amazon's (or AWS_ENDPOINT_URL).")
]
Region = Annotated[str | None, typer.Option(help="S3 region.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Root = Annotated[str, typer.Argument(help="output.root of the runs.")]
Collection = Annotated[str | None, typer.Option(help="Only the tables of this one.")]
Partition = Annotated[
    list[str] | None, typer.Option(help="Only these tables: --partition 'dt>=2026-01-01'.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set output.root=vectors.")
]
Steal = Annotated[
    bool, typer.Option("--steal", help="Take tables from a run that still seems to be alive.")
]
