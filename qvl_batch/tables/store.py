"""A directory of Lance tables: open, list, create, and say clearly why it does not work."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections import defaultdict
from functools import cached_property

import lance
import pyarrow as pa
from lance.file import LanceFileSession
from lance.schema import LanceSchema

from qvl_batch import crash
from qvl_batch.errors import RecipeMismatchError, StorageError
from qvl_batch.recipe import differences
from qvl_batch.storage import Storage, is_local, local_path, scheme_of
from qvl_batch.tables.history import History
from qvl_batch.tables.layout import table_uri

RECIPE_METADATA = b"qvl.recipe"

_SCHEMES = ("file", "s3", "gs", "az")
_PROBE = "_qvl_write_probe"
# A wrong endpoint shall be told in seconds: Lance's own defaults try for minutes.
_IMPATIENT = {
    "connect_timeout": "3s",
    "timeout": "5s",
    "client_max_retries": "1",
    "client_retry_timeout": "5",
}

# (text in an error of Lance's object store, problem, remedy), first match wins.
_CAUSES = (
    # Before "access is denied": a full bucket's answer is a 403, too.
    (
        r"No space left|StorageFull|os error 28|Disk quota|os error 122"
        r"|QuotaExceeded|InsufficientStorage|507 ",
        "there is no space left",
        "Free some, or choose another output.root; what is committed stays, run this again.",
    ),
    (
        r"NoSuchBucket|ContainerNotFound|bucket does not exist",
        "the bucket does not exist",
        "Create it, or correct output.root.",
    ),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|ExpiredToken|AuthenticationFailed"
        r"|401 Unauthorized",
        "the credentials are refused",
        "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile or identity in use.",
    ),
    (
        r"AccessDenied|AuthorizationFailure|403 Forbidden",
        "access is denied",
        "Give this identity the right to list, read and write there, or use other credentials.",
    ),
    (
        r"CredentialsNotLoaded|no providers in chain|token request|Failed to get AWS credentials",
        "no credentials were found",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or run with an identity.",
    ),
    (
        r"error sending request|timed out|timeout|dns error|Connection refused",
        "the endpoint does not answer",
        "Check storage.endpoint_url and the network.",
    ),
    (
        r"Read-only file system|os error 30",
        "the file system is read-only",
        "Choose an output.root that can be written.",
    ),
    (
        r"Permission denied|Operation not permitted|os error 13",
        "permission is denied",
        "Give this user the right to read and write there, or choose another output.root.",
    ),
    (
        r"Not a directory|os error 20",
        "a part of the path is a file",
        "Choose an output.root that is a directory.",
    ),
)


def storage_error(uri: str, error: BaseException) -> StorageError:
    """Return one clear line, with the remedy, for an error raised by Lance or the system."""
    text = str(error)
    for pattern, problem, remedy in _CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            return StorageError(f"{uri}: {problem}.", remedy)
    first_line = text.splitlines()[0] if text else type(error).__name__
    return StorageError(f"{uri} can not be used: {first_line[:300]}", "Check the path.")


def normal_root(root: str) -> str:
    """Return the root as Lance takes it: an absolute path, or a uri without a trailing slash.

    Raises:
        StorageError: If Lance does not know the scheme.
    """
    scheme = scheme_of(root)
    if scheme not in _SCHEMES:
        remedy = "Write gs://." if scheme == "gcs" else "Use a local path, s3://, gs:// or az://."
        raise StorageError(f"output.root {root} has the scheme {scheme}://.", remedy)
    if scheme == "file":
        # Workers may run in another directory than the driver.
        return os.path.abspath(os.path.expanduser(local_path(root)))
    return root.rstrip("/")


class TableStore:
    """The tables under one root, behind one shared Lance session.

    Args:
        root: A local path (made absolute), ``file://``, ``s3://``, ``gs://`` or ``az://``.
        storage: How an object store is reached.
    """

    def __init__(self, root: str, storage: Storage | None = None) -> None:
        self.root = normal_root(root)
        self.storage = storage or Storage()
        self.histories: defaultdict[str, History] = defaultdict(History)

    def __reduce__(self) -> tuple[type[TableStore], tuple[str, Storage]]:
        return type(self), (self.root, self.storage)

    def __repr__(self) -> str:
        return f"TableStore({self.root!r})"

    @cached_property
    def session(self) -> lance.Session:
        """The metadata and index cache of all tables of this store."""
        return lance.Session()

    @cached_property
    def options(self) -> dict[str, str]:
        return self.storage.lance_options(self.root)

    def uri(self, name: str) -> str:
        return table_uri(self.root, name)

    def files(self, name: str) -> LanceFileSession:
        """Return access to the files of a table, by their path within it."""
        return LanceFileSession(self.uri(name), storage_options=self.options)

    def open(self, name: str) -> lance.LanceDataset | None:
        """Return the latest version of a table, or None if there is no such table.

        Raises:
            StorageError: If that can not be told: credentials, bucket, permission, network, or a
                damaged table.
        """
        try:
            return lance.dataset(self.uri(name), storage_options=self.options, session=self.session)
        except (ValueError, OSError, RuntimeError) as error:
            if _says_absent(error):
                return None
            raise storage_error(self.uri(name), error) from error

    def open_existing(self, name: str) -> lance.LanceDataset:
        """Return the latest version of a table that is there.

        Raises:
            StorageError: As `open`, or if there is no such table.
        """
        dataset = self.open(name)
        if dataset is None:
            raise StorageError(f"There is no table {self.uri(name)}.", "Check root and name.")
        return dataset

    def names(self) -> list[str]:
        """Return the names of all tables under the root, sorted; none if there is no root yet.

        Raises:
            StorageError: If the root can not be listed.
        """
        try:
            session = LanceFileSession(self.root, storage_options=self.options)
            folders = session.list_with_delimiter().common_prefixes
        except (ValueError, OSError, RuntimeError) as error:
            raise storage_error(self.root, error) from error
        names = [folder.rstrip("/").rsplit("/", 1)[-1] for folder in folders]
        return sorted(name.removesuffix(".lance") for name in names if name.endswith(".lance"))

    def create(self, name: str, schema: pa.Schema) -> lance.LanceDataset:
        """Return an empty table of this schema, or the one that somebody else just created.

        Raises:
            RecipeMismatchError: If there is a table of another schema or recipe.
            StorageError: If it can not be created.
        """
        # Not write_dataset(mode="create"): of two creators at once the second overwrites the first
        # one's table, rows and all. An Overwrite of version 0 without retries can only make
        # version 1.
        empty = lance.LanceOperation.Overwrite(LanceSchema.from_pyarrow(schema), [])
        crash.reached("create-table")
        try:
            lance.LanceDataset.commit(
                self.uri(name),
                lance.Transaction(0, empty),
                storage_options=self.options,
                max_retries=0,
            )
        except (ValueError, OSError, RuntimeError) as error:
            if self.open(name) is None:
                raise storage_error(self.uri(name), error) from error
        present = self.open(name)
        if present is None:
            raise StorageError(f"{self.uri(name)} was removed while it was created.", "Run again.")
        difference = schema_difference(schema, present.schema)
        if difference:
            raise RecipeMismatchError(
                f"Table {self.uri(name)} has another schema: {difference}.",
                "Use the same recipe and manifest columns, or another output.collection.",
            )
        refuse_other_recipe(self.uri(name), schema, present.schema)
        return present

    def check_writable(self) -> None:
        """Write and remove a small file under the root; create a local root.

        Raises:
            StorageError: With one line that says why nothing can be written there.
        """
        try:
            if is_local(self.root):
                self._check_local()
            else:
                self._check_remote()
        except (ValueError, OSError, RuntimeError) as error:
            endpoint = self.storage.endpoint_url
            place = f"{self.root} at {endpoint}" if endpoint else self.root
            raise storage_error(place, error) from error

    def _check_local(self) -> None:
        parent = os.path.dirname(self.root)
        if not os.path.exists(self.root) and not os.path.isdir(parent):
            raise StorageError(
                f"{self.root} can not be created: there is no directory {parent}.",
                "Create it, or correct output.root.",
            )
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise StorageError(
                f"{self.root} is not a directory.", "Choose an output.root that is a directory."
            )
        os.makedirs(self.root, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as probe:
            probe.write(b"qvl")

    def _check_remote(self) -> None:
        session = LanceFileSession(self.root, storage_options=self.options | _IMPATIENT)
        with tempfile.NamedTemporaryFile() as probe:
            probe.write(b"qvl")
            probe.flush()
            session.upload_file(probe.name, _PROBE)
        # A run needs no right to delete, and another driver may have removed the probe.
        with contextlib.suppress(OSError):
            session.delete_file(_PROBE)
        session.list_with_delimiter()


def name_of(dataset: lance.LanceDataset) -> str:
    """Return the name of an open table: the last part of its uri, without ``.lance``."""
    return dataset.uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".lance")


def schema_difference(ours: pa.Schema, theirs: pa.Schema) -> str:
    """Return the first difference of column names, order, types or nullability; '' if none."""
    for position in range(max(len(ours), len(theirs))):
        mine = ours.field(position) if position < len(ours) else None
        other = theirs.field(position) if position < len(theirs) else None
        if mine is None or other is None or not mine.equals(other):
            return f"column {position} is {_field_text(other)}, not {_field_text(mine)}"
    return ""


def refuse_other_recipe(uri: str, ours: pa.Schema, theirs: pa.Schema) -> None:
    """Compare the recipes stated in two schemas; a schema that states none passes.

    Raises:
        RecipeMismatchError: With every field that differs, and what to do.
    """
    stated = [(schema.metadata or {}).get(RECIPE_METADATA) for schema in (ours, theirs)]
    if None in stated:
        return
    found = differences(*(json.loads(text) for text in stated))
    if found:
        listed = "; ".join(f"{key} is {other!r} there, {mine!r} here" for key, mine, other in found)
        raise RecipeMismatchError(
            f"Table {uri} was made by another recipe: {listed}.",
            "Set the recipe to what it is there, or write to a new output.collection.",
        )


def _field_text(field: pa.Field | None) -> str:
    return "missing" if field is None else str(field).replace("pyarrow.Field", "")


def _says_absent(error: BaseException) -> bool:
    text = str(error)
    return (
        text.startswith("Dataset at path")
        and "was not found" in text
        # An object store's own 404 or 403 is a wrong bucket or key, not an absent table.
        and "status code" not in text
    )
