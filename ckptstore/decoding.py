"""A chunk object, and those that it stands on: fetched, and decoded to raw bytes."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ckptstore import chunk
from ckptstore.errors import CorruptError, MissingChunkError, retold
from ckptstore.kernels import ByteArray
from ckptstore.manifest import ChunkRef, Manifest
from ckptstore.objects.base import Objects


@contextlib.contextmanager
def named(manifest: Manifest, index: int) -> Iterator[None]:
    """Add to an error of a chunk of the manifest's table which tensors of which checkpoint it concerns."""
    try:
        yield
    except CorruptError as error:
        paths = manifest.paths_of_chunk(index)
        paths = paths if len(paths) <= 8 else [*paths[:8], f"and {len(paths) - 8} more"]
        error.key = error.key or manifest.chunks[index].key
        where = f"step {manifest.step} of run {manifest.run!r}: {', '.join(paths)}"
        raise retold(error, f"{where}: the chunk {error.key}: {error}") from error


def get_chain(objects: Objects, chain: Sequence[ChunkRef]) -> list[bytes]:
    """The objects of a chain. Raises MissingChunkError with the `key` of one that is not there, UnavailableError."""
    return list(each_of_chain(objects, chain))


def get_chain_unchecked(objects: Objects, chain: Sequence[ChunkRef]) -> list[bytes]:
    """The same by `get_unchecked`: if decoding fails, `each_of_chain` is to be tried before they are called damaged."""
    return [_present(ref, objects.get_unchecked(ref.key)) for ref in chain]


def each_of_chain(objects: Objects, chain: Sequence[ChunkRef]) -> Iterator[bytes]:
    """The same one by one, each fetched when it is asked for, so that no more than one need be held."""
    for ref in chain:
        yield _present(ref, objects.get(ref.key))


def _present(ref: ChunkRef, content: bytes | None) -> bytes:
    if content is None:
        error = MissingChunkError("it is not in the store (deleted by hand, by a life-cycle rule, or by a collection)")
        error.key = ref.key
        raise error
    return content


def decode_chain(
    chain: Sequence[ChunkRef], contents: Iterable[bytes], out: ByteArray, *, verify_each: bool = False
) -> None:
    """Write the raw bytes of the last chunk of a chain into `out`, verified.

    Args:
        chain: in the order of decoding: a full chunk, and the deltas on it.
        contents: the objects of the chain; taken one by one, and not kept.
        out: contiguous, as long as the raw bytes of each of the chain. It may have been written to when this raises.
        verify_each: compare each of the chain with its digest, and not only the last, which covers all of them: it
            takes longer, and an error names the object that is damaged and not one that stands on it.

    Raises:
        CorruptError: an object is not what was saved; `key` says which, as far as can be told.
        What `contents` raises, as it is.
    """
    base: chunk.Base | None = None
    # Each chunk and its base take turns in two memories, however long the chain is; the last one's turn is in `out`.
    other = np.empty(len(out), np.uint8) if len(chain) > 1 else out
    one_by_one = iter(contents)
    for number, ref in enumerate(chain):
        behind = len(chain) - 1 - number
        raw = other if behind % 2 else out
        content = next(one_by_one)
        try:
            if len(content) != ref.stored:
                raise CorruptError(f"it has {len(content)} bytes in place of {ref.stored}")
            chunk.decode(content, None if behind and not verify_each else ref.digest, raw, base)
        except CorruptError as error:
            error.key = ref.key
            raise
        base = chunk.Base(ref.digest, raw)
        del content  # before the next one is fetched
