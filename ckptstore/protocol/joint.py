"""A save of many processes: one session, chunks from all of them, one manifest. The steps are those of saves.py.

One process, the coordinator, opens the session (`begin`) and tells the others. Each of them, and the coordinator, holds
its own part of the chunks (`hold_part`, steps 2 to 4), under an id of its own. When all are done, the coordinator
commits (`conclude`). docs/explanation/protocol.md says why a part is as safe as a save by itself.
"""

from collections.abc import Callable, Generator
from typing import Any

from ckptstore.deltas import Held
from ckptstore.errors import UnavailableError
from ckptstore.format import ManifestKey, run_prefix, session_key
from ckptstore.manifest import Manifest
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import may_be_committed
from ckptstore.protocol.operations import Get, List, Open, Operation
from ckptstore.protocol.saves import (
    JointRequest,
    PartRequest,
    SaveRequest,
    close_quietly,
    commit,
    hold,
    look,
    make_manifest,
    session_of,
)


def begin(request: JointRequest) -> Generator[Operation, Any, ManifestKey | None]:
    """Step 1: open the session, which stands and beats on when this returns.

    Returns:
        The run's newest manifest, whose chunks may be those of the new checkpoint.
    """
    try:
        yield Open(session_of(request))
        rows: list[ObjectInfo] = yield List((run_prefix(request.run),))
    except (Exception, KeyboardInterrupt):
        yield from close_quietly(request.save)
        raise
    keyed = [(key, row.modified) for row in rows if may_be_committed(row) and (key := ManifestKey.parse(row.key))]
    return max(keyed, key=lambda pair: (pair[0].step, pair[1]))[0] if keyed else None


def hold_part(part: PartRequest, save: str) -> Generator[Operation, Any, dict[str, Held]]:
    """What each process does for its own chunks: steps 2 to 4, once it has seen the session of `save` itself.

    Raises:
        UnavailableError: it does not see it, so this is another store, or the save has ended.
        What `save` raises.
    """
    [session] = yield Get((session_key(save),))
    if session is None:
        raise UnavailableError(
            f"{session_key(save)}, the session of this save, is not there for this process: it does not see the store "
            "that the coordinator sees (a path on a disk that is not shared?), or a collection has taken the save for "
            "dead. Nothing was committed. Use a store that all processes can reach, and save again."
        )
    return (yield from hold(part))


def conclude(
    request: SaveRequest, held: dict[str, Held], check: Callable[[Manifest], None] = lambda _: None
) -> Generator[Operation, Any, Manifest]:
    """Commit what the processes hold, with the rest of the chunks, which the coordinator has; close the session.

    Args:
        request: the whole checkpoint.
        held: by digest, what `hold_part` returned to each process, after the session was opened.
        check: raises if the manifest must not be committed.

    Raises:
        What `save` raises.
    """
    try:
        found = yield from look(request)
        if not isinstance(found, Manifest):
            rest = {name: raw for name, raw in request.chunks.items() if name not in held}
            if rest:
                more = yield from hold(PartRequest(request.save, rest, found.newest))
                held = {**held, **more}
            manifest = make_manifest(request, found.replaces, held)
            check(manifest)
    except (Exception, KeyboardInterrupt):
        yield from close_quietly(request.save)
        raise
    if isinstance(found, Manifest):
        yield from close_quietly(request.save)
        return found
    yield from commit(manifest, [ManifestKey(request.run, request.step, save) for save in found.replaces])
    return manifest
