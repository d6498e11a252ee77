"""One description of where things lie, mapped to fsspec and to Lance alike.

Credentials never appear here: both sides take them from the standard chain (environment,
shared credentials file, instance or workload identity).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qvl_batch.errors import ConfigError, StorageError

if TYPE_CHECKING:
    import fsspec

OBJECT_SCHEMES = {"s3": None, "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_EXTRAS = {"gcsfs": "gcs", "adlfs": "azure"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(uri: str) -> str:
    """Return ``s3``, ``gs``, … or ``file`` for a local path (also ``C:\\…`` and ``file://``)."""
    # Not urlsplit, which takes a bracket in a bucket or folder name for an IPv6 address.
    found = _SCHEME.match(uri)
    return found[1].lower() if found else "file"


def is_local(uri: str) -> bool:
    return scheme_of(uri) == "file"


def local_path(uri: str) -> str:
    """Return the path of a local uri, without ``file://``."""
    return uri.removeprefix("file://")


def join(root: str, *parts: str) -> str:
    """Append path parts to a local or remote root."""
    return "/".join([root.rstrip("/"), *parts])


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How object stores are reached.

    Args:
        endpoint_url: An S3 endpoint other than Amazon's, with its scheme.
        region: The S3 region.
        anonymous: Read public buckets without credentials.
    """

    endpoint_url: str | None = None
    region: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        url = self.endpoint_url
        if url is not None and urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(
                f"storage.endpoint_url is {url!r}.", "Allowed: a URL with http:// or https://."
            )
        if url is not None and urlsplit(url).username:
            raise ConfigError(
                "storage.endpoint_url holds a user name or password.",
                "Use the standard credential chain (AWS_ACCESS_KEY_ID, ~/.aws/credentials, …).",
            )

    @classmethod
    def of(
        cls,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        anonymous: bool = False,
    ) -> Storage:
        """Fill what is not given from the standard environment variables.

        Done once, on the driver: workers elsewhere may not have these variables.
        """
        environment = os.environ.get
        return cls(
            endpoint_url=endpoint_url
            or environment("AWS_ENDPOINT_URL_S3")
            or environment("AWS_ENDPOINT_URL"),
            region=region or environment("AWS_REGION") or environment("AWS_DEFAULT_REGION"),
            anonymous=anonymous,
        )

    def filesystem(self, uri: str, **s3_options: Any) -> fsspec.AbstractFileSystem:
        """Return the fsspec file system of a uri.

        Args:
            uri: Any uri of the store.
            s3_options: Further arguments of s3fs, such as ``config_kwargs``; other stores and
                local paths take none of them.

        Raises:
            StorageError: If the scheme is unknown or its package is not installed.
        """
        import fsspec

        scheme = scheme_of(uri)
        if scheme == "file":
            return fsspec.filesystem("file")
        if scheme not in OBJECT_SCHEMES:
            known = ", ".join(f"{name}://" for name in OBJECT_SCHEMES)
            raise StorageError(
                f"{uri} has the unknown scheme {scheme}://.", f"Use a local path or one of {known}."
            )
        options: dict[str, Any] = {}
        if scheme == "s3":
            client: dict[str, Any] = {}
            if self.region:
                client["region_name"] = self.region
            if self.endpoint_url:
                client["endpoint_url"] = self.endpoint_url
            options = {"client_kwargs": client, "anon": self.anonymous, **s3_options}
        try:
            return fsspec.filesystem(scheme, **options)
        except ImportError:
            package = OBJECT_SCHEMES[scheme]
            raise StorageError(
                f"{uri} needs the package {package}, which is not installed.",
                f"Install it: pip install 'qvl-batch[{_EXTRAS[package]}]'.",
            ) from None

    def lance_options(self, uri: str) -> dict[str, str]:
        """Return the ``storage_options`` with which Lance reaches the same place."""
        if scheme_of(uri) != "s3":
            return {}
        options = {}
        if self.region:
            options["aws_region"] = self.region
        if self.endpoint_url:
            options["aws_endpoint"] = self.endpoint_url
            options["aws_virtual_hosted_style_request"] = "false"
            if self.endpoint_url.startswith("http://"):
                options["allow_http"] = "true"
        if self.anonymous:
            options["aws_skip_signature"] = "true"
        return options
