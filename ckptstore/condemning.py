"""Marks chunks that were found corrupt, so that no save takes them up again: the next one uploads a good copy.

A list of its own under `condemned/`, as docs/explanation/protocol.md has it. Whoever finds the damage may lack the
right to write, so a mark that cannot be made is no error.
"""

import contextlib
from collections.abc import Iterable

from ckptstore.errors import CorruptError, UnavailableError
from ckptstore.format import condemned_key, new_save_id
from ckptstore.manifest import Condemned, encode
from ckptstore.objects.base import Objects
from ckptstore.writer import now_text


def condemn_corrupt(objects: Objects, *errors: CorruptError) -> bool:
    """Mark the chunks that `errors` are about; True if that was done (or there was nothing to mark)."""
    return condemn_keys(objects, {error.key for error in errors if error.key is not None})


def condemn_keys(objects: Objects, keys: Iterable[str]) -> bool:
    """Mark chunk keys as corrupt."""
    named = sorted(set(keys))
    if not named:
        return True
    mark = new_save_id()
    condemned = Condemned(collection=mark, reason="corrupt", created=now_text(), keys=named)
    with contextlib.suppress(UnavailableError):
        return objects.create(condemned_key(mark), encode(condemned))
    return False
