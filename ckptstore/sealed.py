r"""Sealed JSON: a JSON object whose last member is the BLAKE3 of every byte before it, so that any change is seen.

    {"format": 1, ... ,"digest":"<64 hex digits>"}\n

The digest covers the bytes as they stand in the file, so a reader needs no canonical form of JSON to check it.
Knows nothing of what the object says.
"""

import blake3

from ckptstore.errors import CorruptError

_OPENING = b',"digest":"'
_CLOSING = b'"}\n'
_TAIL_BYTES = len(_OPENING) + 64 + len(_CLOSING)


def seal(json_object: bytes, *, min_bytes: int = 0) -> bytes:
    """Add the digest to the text of a non-empty JSON object, padded with spaces to at least `min_bytes`."""
    assert json_object.endswith(b"}") and not json_object.endswith(b"{}")
    body = json_object[:-1].ljust(min_bytes - _TAIL_BYTES)
    return body + _OPENING + blake3.blake3(body).hexdigest().encode() + _CLOSING


def unseal(content: bytes, key: str) -> bytes:
    """The text of the JSON object without its digest. Raises CorruptError (naming `key`) if a single bit is off."""
    body, tail = content[:-_TAIL_BYTES], content[-_TAIL_BYTES:]
    expected = _OPENING + blake3.blake3(body).hexdigest().encode() + _CLOSING
    if not body or tail != expected:
        raise CorruptError(
            f"{key} is damaged ({len(content)} bytes): its digest does not match its content. "
            "It was changed, cut off, or written by something else."
        )
    return body + b"}"
