"""Backends around another one: `RecordingObjects` remembers the calls, `FailingObjects` breaks them."""

import abc
import builtins
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from ckptstore.errors import UnavailableError
from ckptstore.objects.base import Bytes, ObjectInfo, Objects

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a backend: the method, its key or prefix, and the size of the content that went in or came out.

    A sync has its keys there, joined by spaces. The size is None where there is no content.
    """

    operation: str
    key: str
    size: int | None = None


class _Passing(Objects):
    """Hands each call to another backend through `_pass`, where subclasses see it go by."""

    def __init__(self, inner: Objects) -> None:
        self.inner = inner
        self.url = inner.url
        self.request_threads = inner.request_threads
        self.gets_wait = inner.gets_wait

    def __repr__(self) -> str:
        """Show the backend within."""
        return f"{type(self).__name__}({self.inner!r})"

    def create(self, key: str, content: Bytes) -> bool:
        """Pass it on."""
        return self._pass(Call("create", key, memoryview(content).nbytes), lambda: self.inner.create(key, content))

    def put(self, key: str, content: Bytes) -> None:
        """Pass it on."""
        self._pass(Call("put", key, memoryview(content).nbytes), lambda: self.inner.put(key, content))

    def get(self, key: str) -> bytes | None:
        """Pass it on."""
        return self._pass(Call("get", key), lambda: self.inner.get(key))

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Pass it on."""
        return self._pass(Call("list", prefix), lambda: self.inner.list(prefix))

    def children(self, prefix: str) -> builtins.list[str]:
        """Pass it on."""
        return self._pass(Call("children", prefix), lambda: self.inner.children(prefix))

    def delete(self, key: str) -> None:
        """Pass it on."""
        self._pass(Call("delete", key), lambda: self.inner.delete(key))

    def connect(self) -> None:
        """Pass it on, unseen: it asks for nothing."""
        self.inner.connect()

    def sync(self, keys: Iterable[str]) -> None:
        """Pass it on."""
        wanted = list(keys)
        self._pass(Call("sync", " ".join(wanted)), lambda: self.inner.sync(wanted))

    @abc.abstractmethod
    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        """Do `act`, or not."""


class RecordingObjects(_Passing):
    """Passes every call on and remembers it, also if it fails, in the order in which the calls ended."""

    def __init__(self, inner: Objects) -> None:
        """Record the calls to `inner`."""
        super().__init__(inner)
        self._calls: list[Call] = []
        self._lock = threading.Lock()

    @property
    def calls(self) -> builtins.list[Call]:
        """A copy of what was recorded so far."""
        with self._lock:
            return list(self._calls)

    def count(self, *operations: str) -> int:
        """How many calls of these operations there were; of all, if none is named."""
        return sum(1 for call in self.calls if not operations or call.operation in operations)

    def keys(self, operation: str) -> builtins.list[str]:
        """The keys or prefixes that one operation was called with."""
        return [call.key for call in self.calls if call.operation == operation]

    def clear(self) -> None:
        """Forget what was recorded."""
        with self._lock:
            self._calls.clear()

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        try:
            result = act()
            if isinstance(result, bytes):
                call = replace(call, size=len(result))
            return result
        finally:
            with self._lock:
                self._calls.append(call)


class FailingObjects(_Passing):
    """Fails at the `fail_at`-th call, counted from 1: before the call reaches the store, or after it was done.

    `error` is an exception class or a function that makes one; KeyboardInterrupt or a class of your own will do. With
    `dead`, every later call raises it too and reaches nothing, as if the process had been killed there. Walk `fail_at`
    up from 1 until `failed` stays False: then every call of an action has failed once.
    """

    def __init__(
        self,
        inner: Objects,
        *,
        fail_at: int,
        how: Literal["before", "after"] = "before",
        error: Callable[[], BaseException] = lambda: UnavailableError("a failure that a test asked for"),
        dead: bool = False,
    ) -> None:
        """Break the calls to `inner` as told."""
        super().__init__(inner)
        self._fail_at = fail_at
        self._how = how
        self._error = error
        self._dead = dead
        self._lock = threading.Lock()
        self._count = 0

    @property
    def call_count(self) -> int:
        """How many calls were made, those that failed included."""
        return self._count

    @property
    def failed(self) -> bool:
        """Whether the call that is to fail has come."""
        return self._count >= self._fail_at

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        with self._lock:
            self._count += 1
            number = self._count
        if number < self._fail_at or (number > self._fail_at and not self._dead):
            return act()
        if number == self._fail_at and self._how == "after":
            act()
        raise self._error()
