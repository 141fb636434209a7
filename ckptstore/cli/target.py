"""From what stands on the command line, `STORE[/RUN[@STEP]]`, to a backend, a run and a step.

What a person types is looked up in a fixed order, which HELP says and docs/reference/cli.md explains. Only places that
were typed, the folder above one, and the default store are ever asked.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptstore import catalog
from ckptstore.errors import InvalidInputError, NotFoundError, UnavailableError
from ckptstore.format import MARKER_KEY, RUNS, is_run_name, split_run
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects

__all__ = ["HELP", "STORE_VARIABLE", "Target", "parse_options", "resolve", "resolve_new"]

STORE_VARIABLE = "CKPTSTORE_URL"
HELP = (
    "STORE[/RUN[@STEP]]. A path or URL of a store; of a store and a run in it; or a run alone, of the default store: "
    f"the one that {STORE_VARIABLE} names, else the current folder."
)
_SOME_RUNS = 3


@dataclass(frozen=True, slots=True)
class Target:
    """What a command works on.

    Attributes:
        objects: the backend of the store.
        run: the run, or None for the whole store.
        step: the step, or None for the newest, or for all of them.
    """

    objects: Objects
    run: str | None = None
    step: int | None = None

    def require_run(self) -> str:
        """The run. Raises InvalidInputError if there is none."""
        if self.run is None:
            raise InvalidInputError(
                f"{self.objects.url} is a whole store. Name a run in it: STORE/RUN or STORE/RUN@STEP."
            )
        return self.run

    def refuse_step(self, what: str) -> None:
        """Raise InvalidInputError if there is a step, which `what` has no use for."""
        if self.step is not None:
            raise InvalidInputError(f"{what} a store or a whole run, not one step. Leave out @{self.step}.")


def resolve(text: str | None, options: Mapping[str, Any] | None = None) -> Target:
    """What `text` means, looked up in this order.

    1. Nothing: the default store.
    2. The place of a store: that store.
    3. With a slash: the part after the last one is RUN[@STEP] of the store at the part before it.
    4. Without a slash: RUN[@STEP] of the default store.

    Args:
        text: what the user gave.
        options: fsspec's options.

    Raises:
        NotFoundError: none of these is a store; the text says where was looked.
        InvalidInputError: the store is there, and what follows is no RUN[@STEP].
        UnavailableError: a place cannot be read, so nothing is known.
    """
    if not text:
        return Target(_default_store(options))
    place = _without_slash(text)
    above, name = _split(place)
    if "/" not in place:
        return _resolve_name(name, options)
    whole = open_objects(place, options)
    if _has_marker(whole):
        return Target(whole)
    store = None if above is None else open_objects(above, options)
    if store is not None and _has_marker(store):
        return Target(store, *split_run(name))
    # Stores whose marker was lost: the checkpoints are there, and verify has something to say about it.
    if _has_runs(whole):
        return Target(whole)
    run = name.partition("@")[0]
    if store is not None and is_run_name(run) and catalog.list_run(store, run).by_step:
        return Target(store, *split_run(name))
    raise NotFoundError(
        f"{whole.url} is not a ckptstore store{f', and neither is {store.url}' if store else ''}, or nothing was ever "
        f"saved there. Give STORE, STORE/RUN or STORE/RUN@STEP, where STORE holds a file {MARKER_KEY}."
    )


def resolve_new(text: str, options: Mapping[str, Any] | None = None) -> Target:
    """What `text` means as a place for new checkpoints: STORE/RUN[@STEP], or RUN[@STEP] of the default store.

    Nothing but the default store is looked at, as the other store need not exist yet; and without a step, whether
    `text` is a whole store, which must not be taken for a run beside it.

    Raises:
        InvalidInputError: it is no such place.
        NotFoundError: there is no default store.
    """
    above, name = _split(_without_slash(text))
    if above is None and "/" in text:
        raise InvalidInputError("that is no RUN@STEP in a store. Give STORE/RUN@STEP, such as ./ckpts/lstm@300.")
    run, step = split_run(name)
    if above is None:
        return Target(_default_store(options), run, step)
    if step is None and _has_marker(whole := open_objects(_without_slash(text), options)):
        raise InvalidInputError(f"{whole.url} is a whole store. Name a run in it, which may be new: STORE/RUN.")
    return Target(open_objects(above, options), run, step)


def parse_options(text: str | None) -> dict[str, Any] | None:
    """The storage options in a JSON object. Raises InvalidInputError, which shows nothing of them."""
    if not text:
        return None
    try:
        options = json.loads(text)
    except ValueError:
        options = None  # the error would quote what may be a secret
    if not isinstance(options, dict):
        raise InvalidInputError('the storage options must be a JSON object, such as \'{"profile": "team"}\'.') from None
    return options


def _resolve_name(name: str, options: Mapping[str, Any] | None) -> Target:
    """A name without a slash: a folder here that is a store, else a run of the default store."""
    here = open_objects(name, options)
    unreadable: UnavailableError | None = None
    try:
        if _has_marker(here) or _has_runs(here):
            return Target(here)
    except UnavailableError as error:
        unreadable = error  # a file of that name, or a folder that is not ours: a run of that name may be meant
    try:
        store = _default_store(options)
    except NotFoundError as error:
        if unreadable is not None:
            raise unreadable from None
        raise NotFoundError(f"there is no store at {here.url}, and {name} cannot be a run either: {error}") from None
    return Target(store, *split_run(name))


def _default_store(options: Mapping[str, Any] | None) -> Objects:
    url = os.environ.get(STORE_VARIABLE)
    store = open_objects(url or ".", options)
    if _has_marker(store) or _has_runs(store):
        return store
    if url:
        raise NotFoundError(
            f"{STORE_VARIABLE} names {store.url}, which is not a ckptstore store, or nothing was ever saved there."
        )
    raise NotFoundError(
        f"there is no default store: {STORE_VARIABLE} is not set, and the current folder is not a store. "
        f"Give STORE, STORE/RUN or STORE/RUN@STEP, or set {STORE_VARIABLE}."
    )


def _without_slash(text: str) -> str:
    """`text` without slashes at its end, but for those of the root and of a URL's beginning."""
    shorter = text.rstrip("/")
    return text if not shorter or shorter.endswith(":") else shorter


def _split(place: str) -> tuple[str | None, str]:
    """What stands before the last slash, None if that is no place (a root, a bucket's name), and what follows."""
    above, _, name = place.rpartition("/")
    is_place = bool(above) and not above.endswith(":/") and not above.endswith("://")
    return (above if is_place else None), name


def _has_marker(objects: Objects) -> bool:
    return objects.get(MARKER_KEY) is not None


def _has_runs(objects: Objects) -> bool:
    """Whether there are checkpoints. Other programs have folders named runs too, so manifests are looked for."""
    names = [name for name in objects.children(RUNS) if is_run_name(name)]
    return any(catalog.list_run(objects, name).by_step for name in names[:_SOME_RUNS])
