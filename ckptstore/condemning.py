"""Marks chunks that were found corrupt, so that no save takes them up again: the next one uploads a good copy.

A list of its own under `condemned/`, as docs/explanation/protocol.md has it. Whoever finds the damage may lack the
right to write, so a mark that cannot be made is no error.
"""

import contextlib
from collections.abc import Iterable

from ckptstore import protocol
from ckptstore.errors import CorruptError, UnavailableError
from ckptstore.format import condemned_key, new_save_id
from ckptstore.manifest import Condemned, encode, format_naming
from ckptstore.objects.base import Objects
from ckptstore.performing import Performer
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
        named = sorted(wanted - marked_corrupt(objects))
        mark = new_save_id()
        condemned = Condemned(
            format=format_naming(named), collection=mark, reason="corrupt", created=now_text(), keys=named
        )
        return not named or objects.create(condemned_key(mark), encode(condemned))
    return False


def marked_corrupt(objects: Objects, *, strict: bool = False) -> set[str]:
    """The chunk keys that were found corrupt or missing.

    Lists that cannot be read count as empty, or, if `strict`, raise CorruptError.
    """
    lists = Performer(objects).perform(protocol.read_condemned())
    if strict and None in lists:
        raise CorruptError(protocol.UNREADABLE_LIST)
    return {key for each in lists if each is not None and each.reason == "corrupt" for key in each.keys}
