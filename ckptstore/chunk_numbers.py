"""The chunks that checkpoints name, numbered, so that a million fit in memory without the manifests."""

from array import array
from collections.abc import Iterable

from ckptstore.format import ChunkKey
from ckptstore.manifest import Manifest
from ckptstore.protocol.roots import short_name

__all__ = ["ChunkNumbers"]


class ChunkNumbers:
    """Gives each chunk a number: a manifest names thousands, most of which others name as well."""

    def __init__(self) -> None:
        self.deltas = 0
        """How many of them are deltas."""
        self._numbers: dict[bytes, int] = {}
        self._stored = array("q")

    def __len__(self) -> int:
        return len(self._stored)

    def of(self, manifest: Manifest) -> "array[int]":
        """Those of a manifest."""
        found = array("I")
        for ref in manifest.chunks:
            name = short_name(ref.digest, ref.save, is_delta=ref.base is not None)
            number = self._numbers.setdefault(name, len(self._numbers))
            if number == len(self._stored):
                self._stored.append(ref.stored)
                self.deltas += ref.base is not None
            found.append(number)
        return found

    def holds(self, key: ChunkKey) -> bool:
        """Whether a manifest named this chunk."""
        return short_name(key.digest, key.save_id, is_delta=key.is_delta) in self._numbers

    def stored_bytes(self, numbers: Iterable[int]) -> int:
        """The size of these; one that comes twice counts twice."""
        return sum(self._stored[number] for number in numbers)

    def bytes_of_only(self, gone: Iterable[Iterable[int]], kept: Iterable[Iterable[int]]) -> int:
        """The size of the chunks that are among some numbers and not among others."""
        counts = bytearray(len(self._stored))
        for mark, groups in ((1, gone), (0, kept)):
            for numbers in groups:
                for number in numbers:
                    counts[number] = mark
        return sum(size for size, counts_in in zip(self._stored, counts, strict=True) if counts_in)
