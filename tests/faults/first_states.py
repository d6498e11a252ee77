"""Roots that hold a first state, made once and copied for each case that begins with it."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from qvl_batch.storage import Storage, is_local
from qvl_batch.tables.conditional import check_exclusive, note_exclusive
from qvl_batch.tables.lease import lease_place
from tests.faults import commands, scenario

# What a first state and the second one hold, is one of so many.
VARIANTS = 4


class FirstStates:
    """Makes roots for cases.

    Use as a context manager: leaving it removes what is on disk.

    Args:
        storage: Of an S3 server; None if no case lies on one.
    """

    def __init__(self, storage: Storage | None = None) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="qvl-faults-first-"))
        self._storage = storage
        self._bucket = ""
        self._made: dict[tuple[str, tuple[str, ...]], str] = {}
        if storage is not None:
            self._bucket = make_bucket(storage)
            # Every root on that server is taken for tried: a race is 250 requests.
            check_exclusive(lease_place(f"s3://{self._bucket}/race", storage))

    def __enter__(self) -> FirstStates:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def root(
        self, store: str, folder: Path, steps: Sequence[str], variant: int
    ) -> tuple[str, Storage]:
        """Return a new root after these steps.

        Args:
            store: ``local`` or ``s3``.
            folder: Gets a local root.
            steps: ``before`` and ``after``, in the order in which they are appended; or nothing.
        """
        root, storage = self._place(store, folder)
        if not steps:
            return root, storage
        key = (f"{store}/{variant}", tuple(steps))
        if key not in self._made:
            home = self._scratch / uuid.uuid4().hex
            home.mkdir()
            made, _ = self._place(store, home)
            for step in steps:
                manifest, config = home / "manifest.parquet", home / "config.yaml"
                scenario.write_manifest(manifest, scenario.units(variant)[step])
                scenario.write_config(config, manifest, made, storage, "append")
                commands.embed(str(config))
            self._made[key] = made
        copy_root(self._made[key], root, storage)
        return root, storage

    def _place(self, store: str, folder: Path) -> tuple[str, Storage]:
        if store == "local":
            return str(folder / "vectors"), Storage()
        assert self._storage is not None
        root = f"s3://{self._bucket}/{uuid.uuid4().hex}/vectors"
        note_exclusive(lease_place(root, self._storage))
        return root, self._storage


def copy_root(made: str, root: str, storage: Storage) -> None:
    """Copy everything under a root to a new one on the same store."""
    if is_local(root):
        shutil.copytree(made, root)
        return
    files = storage.filesystem(root, use_listings_cache=False)
    old = files.find(made)
    before, after = (files._strip_protocol(uri) for uri in (made, root))
    files.copy(old, [after + path.removeprefix(before) for path in old])
    note_exclusive(lease_place(root, storage))


def make_bucket(storage: Storage) -> str:
    """Create a bucket; return its name."""
    import boto3

    name = f"faults-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=storage.endpoint_url, region_name=storage.region)
    client.create_bucket(Bucket=name)
    return name
