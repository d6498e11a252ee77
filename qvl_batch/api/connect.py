"""`connect`: the way into the tables for a notebook."""

from __future__ import annotations

from pathlib import Path

from qvl_batch.api.root import Root
from qvl_batch.storage import Storage


def connect(
    root: str | Path,
    *,
    storage: Storage | None = None,
    model: str | Path | None = None,
    device: str = "auto",
) -> Root:
    """Return what an embed job wrote: collections to be searched, counts, health.

    Nothing of the models is loaded before a query needs one.

    Args:
        root: The job's ``output.root``: a directory, or an address such as ``s3://bucket/vectors``.
        storage: How object stores are reached; None: from the standard environment variables.
        model: Where the checkpoint lies here, if not where the job had it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        StorageError: If there is no such root, or it can not be listed.
    """
    return Root(root, storage=storage, model=model, device=device)
