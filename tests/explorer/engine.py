"""Walks every interleaving of generators of `ckptstore.protocol` over one model of a store.

A state is what the store holds, and where each actor stands. An actor that crashes, or stalls for ever, is one that is
never scheduled again, which every prefix of every interleaving covers; so after each step all is checked that must hold
after a crash of anybody.

Where an actor stands is told by the frames of its generator: the place in the code and the local variables. Two
histories that lead to equal frames go on in the same way and are one. What a `for` loop has still to come is not among
its variables; it follows from them, as no loop in the protocol runs over anything else.

Only what is seen for the first time is really run. The effect of each operation on each content of the store, and the
next place of each actor for each answer, are remembered, so a step costs three look-ups.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

import msgspec

from ckptstore.errors import CheckpointError
from ckptstore.format import RUNS, ChunkKey, ManifestKey, chunk_key, session_key
from ckptstore.manifest import Manifest, decode_manifest, encode
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol import (
    Check,
    Clock,
    Close,
    Create,
    Delete,
    Get,
    List,
    Open,
    Operation,
    Pause,
    Put,
    Sync,
    Upload,
    Uploaded,
)

Steps = Generator[Operation, Any, Any]
Content = frozenset[tuple[str, bytes]]
MODIFIED = 1.0
ALIVE, DEAD = MODIFIED, MODIFIED + 10_000.0
"""What the clock may say: all sessions have just been put, or none has been for hours."""
CHUNK = b"one chunk"
_BITS = 17
_MASK = (1 << _BITS) - 1
_ACTOR_BITS = 3


def atomic(steps: Steps) -> Steps:
    """The same, with each operation on many keys made one of many operations, between which anything may happen."""
    answer: Any = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration:
            return
        except CheckpointError:
            return  # told to its caller; the store is as it left it
        answer = None
        match operation:
            case List(prefixes):
                answer = []
                for prefix in prefixes:
                    rows = yield List((prefix,))
                    answer = [*answer, *rows]
            case Get(keys):
                answer = []
                for key in keys:
                    content = yield Get((key,))
                    answer = [*answer, *content]
            case Delete(keys):
                for key in keys:
                    yield Delete((key,))
            case Upload(save, digests, bases, below):
                answer = {}
                for digest in digests:
                    base = {digest: bases[digest]} if digest in bases else {}
                    uploaded = yield Upload(save, (digest,), base, {digest: 1} if digest in below else {})
                    answer = {**answer, **uploaded}
            case Sync() | Pause():
                pass
            case _:
                answer = yield operation


def perform(operation: Operation, content: Content) -> Iterable[tuple[Any, Content]]:
    """What an operation may answer, and what the store holds then."""
    there = dict(content)
    match operation:
        case List((prefix,)):
            rows = [ObjectInfo(key, len(there[key]), MODIFIED) for key in sorted(there) if key.startswith(prefix)]
            yield rows, content
        case Get((key,)):
            yield [there.get(key)], content
        case Create(key, new):
            yield (False, content) if key in there else (True, content | {(key, new)})
        case Put(key, new):
            yield None, frozenset({**there, key: new}.items())
        case Open(session):
            yield None, frozenset({**there, session_key(session.save): encode(session)}.items())
        case Close(save):
            yield None, _without(content, session_key(save))
        case Delete((key,)):
            yield None, _without(content, key)
        case Upload(save, (digest,), bases, below):
            if below:
                yield {}, content
            key = chunk_key(digest, save, is_delta=bool(bases))
            yield {digest: Uploaded(len(CHUNK), is_delta=bool(bases))}, content | {(key, CHUNK)}
        case Check(chunk):
            yield all(link.key in there for link in chunk.chain), content
        case Clock():
            yield ALIVE, content
            yield DEAD, content
        case _:
            raise AssertionError(operation)


def _without(content: Content, key: str) -> Content:
    return frozenset(item for item in content if item[0] != key)


@dataclass(slots=True)
class Place:
    """Where an actor stands: how it came there first, and what it does next (None: it has ended)."""

    actor: int
    history: tuple[Any, ...]
    operation: int | None
    next: dict[int, int] = field(default_factory=dict)
    """Answer -> place."""


@dataclass(slots=True)
class Found:
    """The outcome of an exploration."""

    states: int = 0
    contents: int = 0
    """How many different contents of the store there were."""
    places: int = 0
    complete: bool = True
    """Whether all states were visited."""
    lost: list[str] | None = None
    """The steps that led to a loss."""


class Explorer:
    """The walk over one scene: the content to begin with, and the actors, each made anew as often as asked for."""

    def __init__(self, content: Content, actors: list[Callable[[], Steps]], check: Callable[[Content], str | None]):
        self._actors = actors
        self._check = check
        self._numbers: dict[Any, int] = {}
        self._answers: list[Any] = []
        self._contents: dict[Content, int] = {}
        self.contents: list[Content] = []
        self._operations: dict[Operation, int] = {}
        self._operation_list: list[Operation] = []
        self._places: dict[Any, int] = {}
        self._place_list: list[Place] = []
        self._effects: dict[int, list[tuple[int, int]]] = {}
        self._bad: dict[int, str] = {}
        self._shifts = range(_BITS * len(actors), -1, -_BITS)
        self._start = [self._content(content), *(self._place(number, ()) for number in range(len(actors)))]

    def explore(self, limit: int) -> Found:
        """Visit every state, at most `limit`, or until one is bad."""
        start = self._pack(tuple(self._start))
        came_from = {start: 0}
        """State -> the state before and the actor that took the step, in one number: there may be many millions."""
        todo = [start]
        while todo:
            packed = todo.pop()
            state = self._unpack(packed)
            for actor in range(1, len(state)):
                for new in self._steps(state, actor):
                    number = self._pack(new)
                    if number in came_from:
                        continue
                    came_from[number] = packed << _ACTOR_BITS | actor
                    if new[0] in self._bad:
                        return self._found(came_from, [self._bad[new[0]], *self._path(came_from, number)])
                    todo.append(number)
            if len(came_from) >= limit:
                break
        return self._found(came_from, complete=not todo)

    def _found(self, came_from: dict[int, int], lost: list[str] | None = None, *, complete: bool = False) -> Found:
        return Found(len(came_from), len(self.contents), len(self._place_list), complete, lost)

    def _pack(self, state: tuple[int, ...]) -> int:
        number = 0
        for part in state:
            number = number << _BITS | part
        return number

    def _unpack(self, number: int) -> tuple[int, ...]:
        return tuple(number >> shift & _MASK for shift in self._shifts)

    def _path(self, came_from: dict[int, int], number: int) -> list[str]:
        told = []
        while came_from[number]:
            number, actor = came_from[number] >> _ACTOR_BITS, came_from[number] & (1 << _ACTOR_BITS) - 1
            operation = self._place_list[self._unpack(number)[actor]].operation
            assert operation is not None
            told.append(f"{actor}: {_short(self._operation_list[operation])}")
        return told[::-1]

    def _steps(self, state: tuple[int, ...], actor: int) -> Iterable[tuple[int, ...]]:
        place = self._place_list[state[actor]]
        if place.operation is None:
            return
        key = state[0] << _BITS | place.operation
        effects = self._effects.get(key)
        if effects is None:
            effects = self._effects[key] = [
                (self._answer(answer), self._content(content))
                for answer, content in perform(self._operation_list[place.operation], self.contents[state[0]])
            ]
        for answer, content in effects:
            after = place.next.get(answer)
            if after is None:
                after = place.next[answer] = self._place(place.actor, (*place.history, self._answers[answer]))
            yield (content, *state[1:actor], after, *state[actor + 1 :])

    def _answer(self, answer: Any) -> int:
        number = self._numbers.setdefault(freeze(answer), len(self._answers))
        if number == len(self._answers):
            self._answers.append(answer)
        return number

    def _content(self, content: Content) -> int:
        number = self._contents.setdefault(content, len(self.contents))
        if number == len(self.contents):
            self.contents.append(content)
            if (bad := self._check(content)) is not None:
                self._bad[number] = bad
        return number

    def _place(self, actor: int, history: tuple[Any, ...]) -> int:
        """Run an actor from its beginning, with these answers, and see where it stands."""
        steps = atomic(self._actors[actor]())
        operation: Operation | None = None
        try:
            operation = next(steps)
            for answer in history:
                operation = steps.send(answer)
        except StopIteration:
            operation = None
        key = (actor, freeze(steps))
        number = self._places.setdefault(key, len(self._place_list))
        if number == len(self._place_list):
            assert number <= _MASK
            self._place_list.append(Place(actor, history, None if operation is None else self._operation(operation)))
        return number

    def _operation(self, operation: Operation) -> int:
        key: Any = freeze(operation)
        number = self._operations.setdefault(key, len(self._operation_list))
        if number == len(self._operation_list):
            self._operation_list.append(operation)
        return number


def freeze(value: Any) -> Any:
    """A value that can be compared and hashed, equal for equal ones."""
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return "ended"
        variables = tuple((name, freeze(each)) for name, each in sorted(frame.f_locals.items()))
        return (id(frame.f_code), frame.f_lasti, variables, freeze(value.gi_yieldfrom))
    if isinstance(value, msgspec.Struct):
        return (type(value).__name__, *(freeze(getattr(value, name)) for name in value.__struct_fields__))
    if isinstance(value, dict):
        return ("dict", *((freeze(key), freeze(each)) for key, each in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(freeze, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(freeze, value))
    if isinstance(value, Exception):
        return (type(value).__name__, str(value))
    plain = value is None or isinstance(value, str | bytes | int | float | ManifestKey | ChunkKey) or callable(value)
    assert plain, f"whether two of {type(value)} are the same is not known"
    return value


def _short(operation: Operation) -> str:
    fields = [str(getattr(operation, name))[:120] for name in operation.__struct_fields__]
    return f"{type(operation).__name__} {' '.join(fields)}"


def run_alone(steps: Steps, content: Content, clock: float = DEAD) -> Content:
    """Carry one actor out to its end with nobody else there."""
    stepping = atomic(steps)
    answer: Any = None
    while True:
        try:
            operation = stepping.send(answer)
        except StopIteration:
            return content
        effects = list(perform(operation, content))
        answer, content = effects[-1 if clock == DEAD else 0]


def manifests(content: Content) -> list[Manifest]:
    """The committed manifests in a store."""
    found = []
    for key, value in content:
        if key.startswith(RUNS) and (parsed := ManifestKey.parse(key)):
            decoded = decode_manifest(value, parsed)
            if isinstance(decoded, Manifest):
                found.append(decoded)
    return found


def lost_chunk(content: Content) -> str | None:
    """What must never be: a committed checkpoint one of whose chunks is not there."""
    there = {key for key, _ in content}
    for manifest in manifests(content):
        for ref in manifest.chunks:
            if ref.key not in there:
                return f"LOST: {manifest.key} names {ref.key}, which is gone"
    return None
