"""A Lance table at a path of its own, read as a list of queries, labels or candidates."""

from __future__ import annotations

import os
from collections.abc import Sequence

import lance
import pyarrow as pa

from qvl_batch.errors import ManifestError
from qvl_batch.storage import Storage, is_local, local_path
from qvl_batch.tables.store import storage_error


def read_lance(path: str, storage: Storage, columns: Sequence[str]) -> pa.Table:
    """Return those of the columns that the table has, of its newest version.

    Raises:
        ManifestError: If there is no Lance table.
        StorageError: If it can not be read.
    """
    place = os.path.abspath(local_path(path)) if is_local(path) else path
    try:
        dataset = lance.dataset(place, storage_options=storage.lance_options(path) or None)
        names = [name for name in columns if name in dataset.schema.names]
        return dataset.to_table(columns=names)
    except (ValueError, OSError, RuntimeError) as error:
        if "was not found" in str(error) or "Not a directory" in str(error):
            raise ManifestError(f"{path} is no Lance table.", "Check the path.") from None
        raise storage_error(path, error) from error
