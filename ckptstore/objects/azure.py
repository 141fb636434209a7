"""Objects in Azure Blob Storage, through adlfs.

A container is a flat space of names, so listings are asked for as such: adlfs's own go folder by folder, and tell an
absent container from an empty one by nothing. Uploads, downloads and deletes are adlfs's.
"""

import builtins
from collections.abc import Iterator
from typing import Any

from ckptstore.objects.base import ObjectInfo
from ckptstore.objects.remote import FsspecObjects

__all__ = ["AzureObjects", "is_azure"]

NO_BLOB = "BlobNotFound"
REFUSED = (
    "AuthorizationFailure",
    "AuthorizationPermissionMismatch",
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
)


def is_azure(url: str) -> bool:
    """Tell whether adlfs serves this URL."""
    return url.partition("://")[0] in ("abfs", "abfss", "az")


class AzureObjects(FsspecObjects):
    """The objects below `abfs://container/prefix`."""

    request_threads = 16

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Read the flat listing, every page of it."""
        with self._explained("list", prefix):
            start, rows = self._listed(prefix)
        return sorted(
            (
                ObjectInfo(row.name[start:], int(row.size), row.last_modified.timestamp())
                for row in rows
                if row.name[start:] and not row.name.endswith("/")
            ),
            key=lambda row: row.key,
        )

    def children(self, prefix: str) -> builtins.list[str]:
        """Take the names from the flat listing: where there are folders, a last key may leave an empty one behind."""
        keys = (row.key[len(prefix) :] for row in self.list(prefix))
        return sorted({name for key in keys for name, slash, _ in [key.partition("/")] if slash})

    def _listed(self, prefix: str) -> tuple[int, builtins.list[Any]]:
        """How long what precedes our keys is, and the rows. Of an account with real folders without these."""
        from fsspec.asyn import sync

        connection = self._connected()
        container, root, _ = connection.fs.split_path(connection.root)
        start = f"{root.rstrip('/')}/" if root else ""
        rows = sync(connection.fs.loop, _read_listing, connection.fs, container, start + prefix)
        return len(start), [row for row in rows if (row.metadata or {}).get("hdi_isfolder") != "true"]

    def _is_missing_key(self, error: FileNotFoundError) -> bool:
        return _code(error) == NO_BLOB

    def _told(self, error: BaseException) -> str:
        """Without the request's number, the time and the XML that Azure's texts go on with."""
        return super()._told(error).partition(" RequestId:")[0].rstrip(".")

    def _advice(self, action: str, error: BaseException) -> str:
        code = _code(error)
        container = self.url.partition("://")[2].partition("/")[0]
        if code == "ContainerNotFound":
            return f"The container {container!r} does not exist in that account: create it, or correct the URL."
        if code in REFUSED:
            return (
                "The credentials are wrong, expired, or lack the role Storage Blob Data Contributor (to read: Storage "
                "Blob Data Reader): look at account_key, sas_token or credential (storage_options)."
            )
        return "Check the network, and account_name or connection_string (storage_options), then try again."


async def _read_listing(fs: Any, container: str, prefix: str) -> builtins.list[Any]:
    async with fs.service_client.get_container_client(container=container) as client:
        return [row async for row in client.list_blobs(name_starts_with=prefix, include=["metadata"])]


def _code(error: BaseException | None) -> str | None:
    """Azure's own code for an error, somewhere in the chain of causes."""
    for link in _chain(error):
        code = getattr(link, "error_code", None)
        if code is not None:
            return str(getattr(code, "value", code))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
