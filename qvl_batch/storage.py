"""One description of where things lie, mapped to fsspec and to Lance alike.

Credentials never appear here: both sides take them from the standard chain (environment,
shared credentials file, instance or workload identity).
"""

from __future__ import annotations

import errno
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


def explain(error: Exception, uri: str) -> StorageError:
    """Turn an error of fsspec, botocore or the operating system into one line with a remedy.

    Only names and codes are kept: a message may hold signed URLs.
    """
    code = ""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
    name = type(error).__name__
    text = f"{name} {code} {error}"
    if "NoCredentials" in text or "PartialCredentials" in text:
        return StorageError(
            f"No credentials for {uri}.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a shared credentials file or an "
            "instance identity; or storage.anonymous for public buckets.",
        )
    if any(
        word in text for word in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken")
    ):
        return StorageError(f"The credentials are refused at {uri}.", "Check key, secret, region.")
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return StorageError(
            f"There is no bucket for {uri}.", "Check its name, endpoint and region."
        )
    if isinstance(error, PermissionError) or any(
        word in text for word in ("AccessDenied", "Forbidden", " 403 ")
    ):
        return StorageError(
            f"Access to {uri} is denied.", "Check the credentials and their permissions."
        )
    if any(
        word in text
        for word in (
            "EndpointConnection",
            "ConnectTimeout",
            "ConnectionClosed",
            "Cannot connect",
            "ClientConnector",
            "ConnectionRefused",
        )
    ):
        return StorageError(
            f"{uri} can not be reached.", "Check the network and storage.endpoint_url."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"No space is left for {uri}.", "Free some and run this again.")
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return StorageError(f"{uri} lies on a read-only file system.", "Choose another place.")
    if isinstance(error, FileNotFoundError):
        return StorageError(f"There is nothing at {uri}.", "Check the address.")
    detail = code or (error.strerror if isinstance(error, OSError) else "") or name
    return StorageError(f"{uri} can not be read or written ({detail}).", "Check the place.")
