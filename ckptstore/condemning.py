"""Marks chunks that were found corrupt, so that no save takes them up again: the next one uploads a good copy.

A list of its own under `condemned/`, as docs/explanation/protocol.md has it. Whoever finds the damage may lack the
right to write, so a mark that cannot be made is no error.
"""

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

from ckptstore import protocol
from ckptstore.errors import CorruptError, UnavailableError
from ckptstore.format import condemned_key, new_save_id
from ckptstore.manifest import Condemned, Manifest, encode, format_naming
from ckptstore.objects.base import Objects
from ckptstore.pipeline import each
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
    lists = _looked(objects, protocol.read_condemned())
    if strict and None in lists:
        raise CorruptError(protocol.UNREADABLE_LIST)
    return {key for each in lists if each is not None and each.reason == "corrupt" for key in each.keys}


def needs_any(manifest: Manifest, corrupt: set[str]) -> bool:
    """Whether a checkpoint needs one of these chunks."""
    return bool(corrupt) and any(ref.key in corrupt for ref in manifest.chunks)


def _looked(
    objects: Objects, steps: "Generator[protocol.Operation, Any, list[Condemned | None]]"
) -> list[Condemned | None]:
    """What an operation that only lists and gets returns. A `Performer` would import all that encodes chunks."""
    answer: Any = None
    try:
        while True:
            match steps.send(answer):
                case protocol.List(prefixes):
                    answer = [row for prefix in prefixes for row in objects.list(prefix)]
                case protocol.Get(keys):
                    answer = each(objects.get, keys, threads=objects.request_threads)
                case other:
                    raise AssertionError(f"to look is no {other!r}")
    except StopIteration as end:
        found: list[Condemned | None] = end.value
        return found
