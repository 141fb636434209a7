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

SMALL_BYTES = 2**20
"""What weighs no more than this together, a thread may take at once: handing over takes longer than a small item."""
MANY_SMALL = 32
"""So many at most."""

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


def each(
    work: Callable[[T], R], items: Iterable[T], *, threads: int, weigh: Callable[[T], int] | None = None
) -> list[R]:
    """`[work(item) for item in items]`, on up to `threads` threads. Raises the first failure.

    weigh: the bytes that an item is about, if a thread may take several small ones at once.
    """
    todo = list(items)
    if len(todo) <= 1 or threads <= 1:
        return [work(item) for item in todo]
    return staged(todo, [Stage(work, threads)], weigh=weigh, max_inflight_bytes=sys.maxsize)


def staged(
    items: Sequence[T],
    stages: Sequence[Stage],
    *,
    weigh: Callable[[T], int] | None = None,
    max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
    done: Callable[[T], None] | None = None,
) -> list[Any]:
    """Send `items` through `stages`; return what the last one made of each, in the order of `items`.

    Args:
        items: what to work on; they are begun in this order.
        stages: at least one.
        weigh: the bytes that an item holds from the first stage to the last. Without it there is no bound, and a thread
            takes one item at a time.
        max_inflight_bytes: items begun and not done weigh no more than this together; a heavier one goes alone.
        done: called from a worker when an item has passed the last stage, one call at a time.

    Raises:
        BaseException: whatever the first failing worker raised. No thread is left running.
    """
    weights = None if weigh is None else [weigh(item) for item in items]
    return _Pipeline(items, stages, weights, max_inflight_bytes, done).run()


class _Pipeline(Generic[T]):
    def __init__(
        self,
        items: Sequence[T],
        stages: Sequence[Stage],
        weights: Sequence[int] | None,
        max_inflight_bytes: int,
        done: Callable[[T], None] | None,
    ) -> None:
        self._items = items
        self._stages = stages
        self._threads = [max(1, min(stage.threads, len(items))) for stage in stages]
        self._weights = [0] * len(items) if weights is None else weights
        self._most_at_once = 1 if weights is None else MANY_SMALL
        self._max_inflight_bytes = max_inflight_bytes
        self._done = done
        self._made: list[Any] = list(items)
        """What the stages have made of each item so far; only the thread that has taken it touches it."""
        # All that follows is guarded by this condition.
        self._changed = threading.Condition()
        self._waiting: list[deque[int]] = [deque() for _ in stages]
        self._waiting[0].extend(range(len(items)))
        self._finished = self._inflight_bytes = self._inflight = 0
        self._failure: BaseException | None = None

    def run(self) -> list[Any]:
        threads = [
            threading.Thread(target=self._worker, args=(index,), name=f"ckptstore-stage-{index}", daemon=True)
            for index, count in enumerate(self._threads)
            for _ in range(count)
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
        return self._made

    def _is_over(self) -> bool:
        return self._failure is not None or self._finished == len(self._items)

    def _worker(self, index: int) -> None:
        work = self._stages[index].work
        try:
            while taken := self._take(index):
                for number in taken:
                    if self._failure is not None:
                        return
                    self._made[number] = work(self._made[number])
                self._pass_on(index, taken)
        except BaseException as error:  # handed over to the caller of `run`
            self._fail(error)

    def _take(self, index: int) -> list[int]:
        """The numbers of what a thread of a stage is to work on next; none when all is over."""
        with self._changed:
            while not self._is_over():
                if taken := self._next(index):
                    return taken
                self._changed.wait()
            return []

    def _next(self, index: int) -> list[int]:
        """The first item that waits for a stage, or several small ones: fewer as fewer are left, for all threads."""
        waiting = self._waiting[index]
        most = min(len(waiting), self._most_at_once, 1 + len(waiting) // (2 * self._threads[index]))
        taken: list[int] = []
        taken_bytes = 0
        while len(taken) < most:
            weight = self._weights[waiting[0]]
            if taken and taken_bytes + weight > SMALL_BYTES:
                break
            if index == 0 and not self._begin(weight):
                break
            taken.append(waiting.popleft())
            taken_bytes += weight
        return taken

    def _begin(self, weight: int) -> bool:
        """Count one more item as under way, if there is room for it."""
        if self._inflight and self._inflight_bytes + weight > self._max_inflight_bytes:
            return False
        self._inflight += 1
        self._inflight_bytes += weight
        return True

    def _pass_on(self, index: int, taken: list[int]) -> None:
        with self._changed:
            if index + 1 < len(self._stages):
                self._waiting[index + 1].extend(taken)
            else:
                for number in taken:
                    self._finish(number)
            self._changed.notify_all()

    def _finish(self, number: int) -> None:
        self._inflight -= 1
        self._inflight_bytes -= self._weights[number]
        self._finished += 1
        if self._done is not None:
            self._done(self._items[number])

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
