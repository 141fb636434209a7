"""Work on threads, bounded and in stages; the first failure stops the rest and reaches the caller.

Knows nothing of chunks or storage. One of the few places that catch everything: a worker's failure is handed over.
Plain threads rather than `concurrent.futures`, whose pools take no work once the interpreter has begun to exit; a save
in the background has to be finished just then.
"""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

MAX_INFLIGHT_BYTES = 256 * 2**20
"""What a save or restore holds at most beyond the state itself."""

BACKGROUND_NICENESS = 10

Progress = Callable[[int, int], None]
"""What callers may pass to watch: called with the bytes done so far and those to be done in all."""

T = TypeVar("T")
R = TypeVar("R")


def worker_threads() -> int:
    """How many threads to encode, decode and hash with: one a core that this process may use, 16 at most."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    return max(1, min(16, cores))


def background_threads() -> int:
    """How many of them to use beside a training: a quarter, so that it keeps its cores."""
    return max(1, worker_threads() // 4)


def give_way() -> None:
    """Lower the priority of this thread and of those that it will start, for good: the training's come first.

    Only Linux has priorities of threads. Measured on two cores: a step of training takes 1.2 times as long beside a
    save that gives way, and 1.6 to 1.9 times beside one that does not.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + BACKGROUND_NICENESS)


def beside(work: Callable[[], R]) -> R:
    """What `work()` returns or raises, done on a thread of its own that gives way to others."""
    outcome: list[R] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            give_way()
            outcome.append(work())
        except BaseException as error:  # handed over to the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="ckptstore-beside", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a pipeline: `work` takes what the stage before returned, on `threads` threads."""

    work: Callable[[Any], Any]
    threads: int


def each(work: Callable[[T], R], items: Iterable[T], *, threads: int) -> list[R]:
    """`[work(item) for item in items]`, on up to `threads` threads. Raises the first failure."""
    todo = list(items)
    if len(todo) <= 1 or threads <= 1:
        return [work(item) for item in todo]
    return staged(todo, [Stage(work, threads)])


def staged(
    items: Sequence[T],
    stages: Sequence[Stage],
    *,
    weigh: Callable[[T], int] = lambda item: 0,
    max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
    done: Callable[[T], None] | None = None,
) -> list[Any]:
    """Send `items` through `stages`; return what the last one made of each, in the order of `items`.

    Args:
        items: what to work on; they are begun in this order.
        stages: at least one.
        weigh: the bytes that an item holds from the first stage to the last.
        max_inflight_bytes: items begun and not done weigh no more than this together; a heavier one goes alone.
        done: called from a worker when an item has passed the last stage, one call at a time.

    Raises:
        BaseException: whatever the first failing worker raised. No thread is left running.
    """
    return _Pipeline(items, stages, weigh, max_inflight_bytes, done).run()


class _Pipeline(Generic[T]):
    def __init__(
        self,
        items: Sequence[T],
        stages: Sequence[Stage],
        weigh: Callable[[T], int],
        max_inflight_bytes: int,
        done: Callable[[T], None] | None,
    ) -> None:
        self._items = items
        self._stages = stages
        self._weigh = weigh
        self._max_inflight_bytes = max_inflight_bytes
        self._done = done
        self._results: list[Any] = [None] * len(items)
        # All that follows is guarded by this condition.
        self._changed = threading.Condition()
        self._waiting: list[deque[tuple[int, Any]]] = [deque() for _ in stages]
        self._fed = self._finished = self._inflight_bytes = self._inflight = 0
        self._failure: BaseException | None = None

    def run(self) -> list[Any]:
        threads = [
            threading.Thread(target=self._worker, args=(index,), name=f"ckptstore-stage-{index}", daemon=True)
            for index, stage in enumerate(self._stages)
            for _ in range(max(1, min(stage.threads, len(self._items))))
        ]
        try:
            for thread in threads:
                thread.start()
            with self._changed:
                self._changed.wait_for(self._is_over)
        except BaseException as error:  # an interrupt of this thread: the workers are to stop as well
            self._fail(error)
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            raise self._failure
        return self._results

    def _is_over(self) -> bool:
        return self._failure is not None or self._finished == len(self._items)

    def _worker(self, index: int) -> None:
        stage = self._stages[index]
        try:
            while (taken := self._take(index)) is not None:
                number, value = taken
                result = stage.work(value)
                self._pass_on(index, number, result)
                # Not to keep an item alive while waiting for the next.
                del taken, value, result
        except BaseException as error:  # handed over to the caller of `run`
            self._fail(error)

    def _take(self, index: int) -> tuple[int, Any] | None:
        with self._changed:
            while not self._is_over():
                if index == 0 and self._may_begin():
                    number = self._fed
                    self._fed += 1
                    self._inflight += 1
                    self._inflight_bytes += self._weigh(self._items[number])
                    return number, self._items[number]
                if self._waiting[index]:
                    return self._waiting[index].popleft()
                self._changed.wait()
            return None

    def _may_begin(self) -> bool:
        if self._fed == len(self._items):
            return False
        weight = self._weigh(self._items[self._fed])
        return self._inflight == 0 or self._inflight_bytes + weight <= self._max_inflight_bytes

    def _pass_on(self, index: int, number: int, result: Any) -> None:
        with self._changed:
            if index + 1 < len(self._stages):
                self._waiting[index + 1].append((number, result))
            else:
                self._results[number] = result
                self._inflight -= 1
                self._inflight_bytes -= self._weigh(self._items[number])
                self._finished += 1
                if self._done is not None:
                    self._done(self._items[number])
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
