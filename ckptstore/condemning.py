"""Marks chunks that were found corrupt, so that no save takes them up again: the next one uploads a good copy.

A list of its own under `condemned/`, as docs/explanation/protocol.md has it. Whoever finds the damage may lack the
right to write, so a mark that cannot be made is no error.
"""

import contextlib
from collections.abc import Iterable

from ckptstore.errors import CorruptError, UnavailableError
from ckptstore.format import CONDEMNED, condemned_key, new_save_id
from ckptstore.manifest import Condemned, decode_condemned, encode, format_naming
from ckptstore.objects.base import Objects
from ckptstore.writer import now_text


def condemn_corrupt(objects: Objects, *errors: CorruptError) -> bool:
    """Mark the chunks that `errors` are about; True if that was done (or there was nothing to mark)."""
    return condemn_keys(objects, {error.key for error in errors if error.key is not None})


def condemn_keys(objects: Objects, keys: Iterable[str]) -> bool:
    """Mark chunk keys as corrupt."""
    wanted = set(keys)
    if not wanted:
        return True
    with contextlib.suppress(UnavailableError):
        # Every save reads every list, so what is marked already is not marked again.
        named = sorted(wanted - _marked(objects))
        mark = new_save_id()
        condemned = Condemned(
            format=format_naming(named), collection=mark, reason="corrupt", created=now_text(), keys=named
        )
        return not named or objects.create(condemned_key(mark), encode(condemned))
    return False


def _marked(objects: Objects) -> set[str]:
    """The keys that stand in a list with the reason `corrupt` already."""
    marked: set[str] = set()
    for row in objects.list(CONDEMNED):
        with contextlib.suppress(CorruptError):
            content = objects.get(row.key)
            condemned = None if content is None else decode_condemned(content, row.key)
            if condemned is not None and condemned.reason == "corrupt":
                marked |= set(condemned.keys)
    return marked
