"""A chunk object, and those that it stands on: fetched, and decoded to raw bytes."""

from collections.abc import Sequence

import numpy as np

from ckptstore import chunk
from ckptstore.errors import CorruptError, MissingChunkError
from ckptstore.kernels import ByteArray
from ckptstore.manifest import ChunkRef
from ckptstore.objects.base import Objects


def get_chain(objects: Objects, chain: Sequence[ChunkRef]) -> list[bytes]:
    """The objects of a chain. Raises MissingChunkError with the `key` of one that is not there, UnavailableError."""
    return [_get(objects, ref) for ref in chain]


def _get(objects: Objects, ref: ChunkRef) -> bytes:
    content = objects.get(ref.key)
    if content is None:
        error = MissingChunkError("it is not in the store (deleted by hand, by a life-cycle rule, or by a collection)")
        error.key = ref.key
        raise error
    return content


def decode_chain(
    chain: Sequence[ChunkRef], contents: Sequence[bytes], out: ByteArray, *, verify_each: bool = False
) -> None:
    """Write the raw bytes of the last chunk of a chain into `out`, verified.

    Args:
        chain: in the order of decoding: a full chunk, and the deltas on it.
        contents: the objects of the chain.
        out: contiguous, as long as the raw bytes of each of the chain. It may have been written to when this raises.
        verify_each: compare each of the chain with its digest, and not only the last, which covers all of them: it
            takes longer, and an error names the object that is damaged and not one that stands on it.

    Raises:
        CorruptError: an object is not what was saved; `key` says which, as far as can be told.
    """
    base: chunk.Base | None = None
    for number, (ref, content) in enumerate(zip(chain, contents, strict=True)):
        is_last = number == len(chain) - 1
        raw = out if is_last else np.empty(len(out), np.uint8)
        try:
            if len(content) != ref.stored:
                raise CorruptError(f"it has {len(content)} bytes in place of {ref.stored}")
            chunk.decode(content, ref.digest if is_last or verify_each else None, raw, base)
        except CorruptError as error:
            error.key = ref.key
            raise
        base = chunk.Base(ref.digest, raw)
