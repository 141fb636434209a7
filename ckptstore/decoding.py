"""A chunk object, and those that it stands on -> its raw bytes. Knows references and contents, no storage."""

from collections.abc import Sequence

import numpy as np

from ckptstore import chunk
from ckptstore.errors import CorruptError
from ckptstore.kernels import ByteArray
from ckptstore.manifest import ChunkRef


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
