"""By what a source is recognised when an import goes on, and whether its bytes are whole."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import blake3

from ckptstore.errors import InvalidInputError
from ckptstore.migration.sources import Source, files_in
from ckptstore.portable.torch_files import damaged_records
from ckptstore.whole_files import explained

__all__ = ["METADATA_KEY", "Identity", "check_whole", "digest_of", "look"]

METADATA_KEY = "import"
"""Where in a checkpoint's metadata stands what it was imported from."""
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """What a source is like without reading it.

    Attributes:
        name: its name in its folder.
        bytes: the size of its files.
        modified: when the newest of them was written, in UTC.
        files: a digest of their names, sizes and times: a shard that was put back with an older time changes it.
    """

    name: str
    bytes: int
    modified: str
    files: str

    def metadata(self, kind: str, digest: str, leave_out: Sequence[str] = ()) -> dict[str, Any]:
        """What is written beside a checkpoint."""
        about: dict[str, Any] = {
            "source": self.name,
            "kind": kind,
            "bytes": self.bytes,
            "modified": self.modified,
            "files": self.files,
            "digest": digest,
        }
        return {METADATA_KEY: about | ({"leave_out": list(leave_out)} if leave_out else {})}

    def is_that_of(self, about: Any) -> bool:
        """Whether a checkpoint's metadata are of a source of this name, size and time, which need not be read again."""
        return isinstance(about, dict) and (about.get("source"), about.get("bytes"), about.get("files")) == (
            self.name,
            self.bytes,
            self.files,
        )


def look(source: Source) -> Identity:
    """What a source is like now. Raises UnavailableError, NotFoundError."""
    with explained("read", source.path):
        files = files_in(source)
        facts = [path.stat() for path in files]
    names = [os.fsencode(path.relative_to(source.path.parent)) for path in files]
    told = b"".join(
        b"%d %d %d %s" % (len(name), fact.st_size, fact.st_mtime_ns, name)
        for name, fact in zip(names, facts, strict=True)
    )
    newest = max((fact.st_mtime_ns for fact in facts), default=0)
    # In whole microseconds: a float has no room for more.
    modified = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=newest // 1000)
    return Identity(
        source.name,
        sum(fact.st_size for fact in facts),
        modified.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        blake3.blake3(told).hexdigest(16),
    )


def digest_of(source: Source) -> str:
    """BLAKE3 of a file's bytes; of a folder, of the names, sizes and digests of its files. Raises UnavailableError."""
    if source.kind == "file":
        return _digest(source.path)
    whole = blake3.blake3()
    for path in files_in(source):
        name = path.relative_to(source.path).as_posix().encode("utf-8", "surrogateescape")
        whole.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(_digest(path)))
    return whole.hexdigest()


def check_whole(source: Source) -> None:
    """Compare files of torch.save with their own checksums, which torch.load does not do.

    Raises:
        InvalidInputError: a file is damaged; the text says where.
        UnavailableError: it cannot be read.
    """
    for path in files_in(source):
        with explained("read", path):
            damaged = damaged_records(path)
        if damaged:
            raise InvalidInputError(
                f"{path} is damaged: the checksum of {', '.join(damaged[:3])} in it does not match its bytes. "
                "torch.load would not have noticed. Take another copy of it."
            )


def _digest(path: Path) -> str:
    hasher = blake3.blake3()
    with explained("read", path), path.open("rb") as opened:
        while content := opened.read(_READ_BYTES):
            hasher.update(content)
    return hasher.hexdigest()
