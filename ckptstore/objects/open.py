"""From what a user gives as a store's place to its backend; and a trial of what a backend promises.

Opening does no I/O; only `self_test` makes requests.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.format import SCRATCH
from ckptstore.objects.base import Objects

__all__ = ["open_objects", "self_test", "store_time"]

S3_VARIABLE = "CKPTSTORE_S3"


def open_objects(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Objects:
    """Choose the backend for a path or URL. Nothing is read, made or asked for yet."""
    place = os.fspath(url)
    if not place:
        raise InvalidInputError(f"{url!r} is no place for a store. Give a path or a URL such as s3://bucket/prefix.")
    protocol, separator, path = place.partition("://")
    if not separator:
        if mistyped := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", place):
            name = mistyped[0].removesuffix(":/")
            raise InvalidInputError(
                f"{place!r} looks like a URL with a slash too few: give {name}://…, or ./{name}:/… for such a folder."
            )
        return _local(place)
    if protocol in ("file", "local"):
        return _local(path)
    if protocol == "memory":
        from ckptstore.objects.memory import MemoryObjects

        return MemoryObjects(place)
    from ckptstore.objects.azure import AzureObjects, is_azure
    from ckptstore.objects.http import HttpObjects, is_http
    from ckptstore.objects.remote import FsspecObjects, is_s3

    if is_s3(place):
        return _s3(place, storage_options or {})
    if is_azure(place):
        return AzureObjects(place, storage_options)
    return (HttpObjects if is_http(place) else FsspecObjects)(place, storage_options)


def _s3(place: str, storage_options: Mapping[str, Any]) -> Objects:
    """Use obstore beside s3fs where it is installed and can follow all options, unless the user wants it otherwise."""
    from ckptstore.objects.obstore import ObstoreObjects
    from ckptstore.objects.obstore_options import is_installed, unmapped
    from ckptstore.objects.s3 import S3Objects

    wish = os.environ.get(S3_VARIABLE) or None
    if wish not in (None, "s3fs", "obstore"):
        raise InvalidInputError(f"{S3_VARIABLE}={wish!r} names no client of S3. Give s3fs or obstore, or unset it.")
    if wish == "s3fs":
        return S3Objects(place, storage_options)
    fits = is_installed() and not unmapped(storage_options)
    if wish is None or fits:
        return (ObstoreObjects if fits else S3Objects)(place, storage_options)
    if not is_installed():
        raise InvalidInputError(
            f'{S3_VARIABLE}=obstore, and there is none that is new enough. Add it (pip install "ckptstore[obstore]"), '
            f"or unset {S3_VARIABLE}."
        )
    raise InvalidInputError(
        f"{S3_VARIABLE}=obstore, and obstore cannot follow {', '.join(unmapped(storage_options))} exactly. Unset "
        f"{S3_VARIABLE}: s3fs can."
    )


def _local(path: str) -> Objects:
    from ckptstore.objects.local import LocalObjects

    if not path:
        raise InvalidInputError("file:// names no folder. Give it as file:///folder, or as a plain path.")
    return LocalObjects(Path(path).expanduser())


def self_test(objects: Objects) -> None:
    """Try on a scratch key what the protocol needs of a backend; UnavailableError names the promise it breaks."""
    key = f"{SCRATCH}{uuid.uuid4().hex}"
    try:
        _try_promises(objects, key)
    except BaseException:
        with contextlib.suppress(UnavailableError):
            objects.delete(key)  # the first failure tells more than this one could
        raise


def store_time(objects: Objects) -> float:
    """What the store's own clock says now, in seconds since the epoch: the last-modified time of a new object.

    Raises:
        UnavailableError: the backend failed, or it tells no times.
    """
    key = f"{SCRATCH}{uuid.uuid4().hex}"
    objects.put(key, b"what time is it?")
    try:
        times = [row.modified for row in objects.list(key)]
    finally:
        objects.delete(key)
    if not times or times[0] <= 0:
        raise UnavailableError(
            f"{objects.url} tells no last-modified times, so whether a save is alive cannot be seen, and nothing can "
            "be collected there. Use another backend for a store that is shared."
        )
    return times[0]


def _try_promises(objects: Objects, key: str) -> None:
    first, second = b"first", b"second, and longer"
    # Where the answer to a create is lost, its retry finds what it has made itself.
    if not objects.create(key, first) and objects.get(key) != first:
        _lacks(objects, "create says that a new key exists", "no save could ever commit")
    if objects.create(key, second):
        _lacks(
            objects,
            "a second create of one key succeeds (it ignores If-None-Match, or lacks an exclusive put)",
            "two jobs could overwrite each other's checkpoints, and a collector could not stop a dead save",
        )
    found = objects.get(key)
    if found is None:
        _lacks(objects, "get does not see a key that was just created", "a restore could miss the newest checkpoint")
    if found != first:
        _lacks(
            objects,
            "a refused create changed the object, or get gives other bytes than were put",
            "checkpoints could be overwritten or come back corrupt",
        )
    _try_listing(objects, key, len(first))
    objects.delete(key)
    if objects.get(key) is not None:
        _lacks(
            objects, "get still sees a key that was just deleted", "reads may be stale, so garbage is not safe to judge"
        )


def _try_listing(objects: Objects, key: str, size: int) -> None:
    rows = [row for row in objects.list(key[:-1]) if row.key == key]
    if not rows:
        _lacks(
            objects,
            "list does not show a key that was just created",
            "a collector could delete chunks of checkpoints that it does not see",
        )
    if rows[0].size != size:
        _lacks(objects, f"list gives {rows[0].size} bytes for an object of {size}", "sizes could not be trusted")


def _lacks(objects: Objects, promise: str, meaning: str) -> None:
    raise UnavailableError(
        f"{objects.url} cannot hold a store that is shared: {promise}. It means that {meaning}. Use a backend with "
        f"exclusive create and consistent listings (AWS S3, or a look-alike and proxy that pass If-None-Match on)."
    )
