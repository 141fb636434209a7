"""Items that each of several processes needs, each made by one of them and given to all the others.

Knows nothing of chunks or storage: how an item is made, told whole from broken and put in place, the caller says. What
does not arrive whole is made once more where it is needed, so one process that fails costs the others time, no bytes.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ckptstore.errors import CheckpointError
from ckptstore.kernels import ByteArray
from ckptstore.peers import Group
from ckptstore.pipeline import Stage, staged

__all__ = ["Work", "share"]

T = TypeVar("T")

MADE_AHEAD = 16
"""So many of its own items a process may have made before they are given to the others."""


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """What is to be done with an item.

    Attributes:
        room: memory for an item's bytes; the same in each process is as long.
        make: fill the room; raises CheckpointError if that fails.
        is_whole: whether the room holds the item. Nothing else is relied on.
        place: take the bytes from the room to where they belong.
        weigh: bytes that an item takes while it is under way.
        done: called when an item is in its place, one call at a time.
    """

    room: Callable[[T], ByteArray]
    make: Callable[[T, ByteArray], None]
    is_whole: Callable[[T, ByteArray], bool]
    place: Callable[[T, ByteArray], None]
    weigh: Callable[[T], int]
    done: Callable[[T], None] | None = None


def share(items: Sequence[T], peers: Group, work: Work[T], *, making_threads: int, threads: int) -> None:
    """Make each item in one process, and put it in place in all of them. All call this with as many items.

    Args:
        items: in the same order in each process.
        peers: the processes.
        work: what to do with an item.
        making_threads: how many make this process's own share.
        threads: how many check and place what arrives.

    Raises:
        CheckpointError: an item could not be made here either; the first such error, when all that can be is in place.
        UnavailableError: the processes have lost each other.
    """
    _Sharing(items, peers, work, making_threads, threads).run()


class _Sharing(Generic[T]):
    def __init__(self, items: Sequence[T], peers: Group, work: Work[T], making_threads: int, threads: int) -> None:
        self._items = items
        self._peers = peers
        self._work = work
        self._making_threads = making_threads
        self._threads = threads
        self._failures: list[CheckpointError] = []
        # All that follows is guarded by this condition.
        self._changed = threading.Condition()
        self._rooms: dict[int, ByteArray] = {}
        self._to_make = set(range(peers.rank, len(items), peers.size))
        self._made: set[int] = set()
        self._given = 0
        """How many items were given to all."""
        self._is_over = False
        self._crash: BaseException | None = None

    def run(self) -> None:
        making = threading.Thread(target=self._make_own, name="ckptstore-share", daemon=True)
        making.start()
        try:
            staged(
                range(len(self._items)),
                # The first on one thread, so that all processes give and take in the same order.
                [Stage(self._give, 1), Stage(self._take, self._threads)],
                weigh=lambda number: self._work.weigh(self._items[number]),
                done=self._done,
            )
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            making.join()
        if self._crash is not None:
            raise self._crash
        if self._failures:
            raise self._failures[0]

    def _make_own(self) -> None:
        try:
            staged(
                sorted(self._to_make),
                [Stage(self._make, self._making_threads)],
                weigh=lambda number: self._work.weigh(self._items[number]),
            )
        except BaseException as error:  # handed over to the caller of `run`, when the others have got what they can
            self._crash = error
        finally:
            with self._changed:
                self._to_make.clear()
                self._changed.notify_all()

    def _make(self, number: int) -> None:
        with self._changed:
            ahead = MADE_AHEAD * self._peers.size
            self._changed.wait_for(lambda: self._is_over or number < self._given + ahead)
            if self._is_over:
                return
        is_made = True
        try:
            self._work.make(self._items[number], self._room(number))
        except CheckpointError:
            is_made = False  # told when it fails once more, at its turn
        with self._changed:
            if is_made:
                self._made.add(number)
            self._to_make.discard(number)
            self._changed.notify_all()

    def _give(self, number: int) -> int:
        with self._changed:
            self._changed.wait_for(lambda: number not in self._to_make)
        self._peers.give(self._room(number), number % self._peers.size)
        with self._changed:
            self._given = number + 1
            self._changed.notify_all()
        return number

    def _take(self, number: int) -> None:
        item, room = self._items[number], self._room(number)
        try:
            if number not in self._made and not self._work.is_whole(item, room):
                self._work.make(item, room)
            self._work.place(item, room)
        except CheckpointError as error:
            # Not raised yet: the others wait for what this process has still to give.
            self._failures.append(error)
        finally:
            with self._changed:
                del self._rooms[number]

    def _room(self, number: int) -> ByteArray:
        with self._changed:
            room = self._rooms.get(number)
            if room is None:
                room = self._rooms[number] = self._work.room(self._items[number])
            return room

    def _done(self, number: int) -> None:
        if self._work.done is not None:
            self._work.done(self._items[number])
