"""A save in the background: one thread, its result or error kept for whoever asks, and nothing lost at exit."""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import CheckpointError, UnavailableError, retold

__all__ = ["PendingSave"]

T = TypeVar("T")


class PendingSave:
    """A save under way, returned by `Run.save_async`.

    Its error reaches you through `result`, or through the next save of the same run; if neither happens before the
    interpreter ends, it is printed on stderr then. An interpreter that ends in good order waits for the save.

    Attributes:
        run: name of the run.
        step: the step being saved.
    """

    def __init__(self, run: str, step: int, work: Callable[[T], Checkpoint], snapshot: T) -> None:
        self.run = run
        self.step = step
        self._work = work
        self._snapshot: list[Any] = [snapshot]
        self._checkpoint: Checkpoint | None = None
        self._error: BaseException | None = None
        self._told = False
        self._process = os.getpid()
        # Not a daemon: the interpreter must not end while it works.
        self._thread = threading.Thread(target=self._save, name=f"ckptstore-save-{run}-{step}", daemon=False)
        _under_way.add(self)
        self._thread.start()

    def __repr__(self) -> str:
        outcome = "under way" if not self.done() else "failed" if self._error else "saved"
        if self._is_of_another_process():
            outcome = f"under way in process {self._process}"
        return f"<PendingSave {self.run}@{self.step}: {outcome}>"

    def done(self) -> bool:
        """Whether it has ended, either way. In a process that was forked meanwhile that is never known."""
        return not self._thread.is_alive() and not self._is_of_another_process()

    def result(self, timeout: float | None = None) -> Checkpoint:
        """Wait for the save and return its checkpoint.

        Args:
            timeout: seconds to wait at most; None waits for ever.

        Raises:
            TimeoutError: it is still under way after `timeout` seconds; it goes on.
            UnavailableError: this process was forked while the save was under way, and only the other one knows of it.
            Exception: whatever `Run.save` raises, if the save failed.
        """
        if self._is_of_another_process():
            raise UnavailableError(
                f"the save of step {self.step} of run {self.run!r} is under way in process {self._process}, from which "
                "this one was forked: ask there, or look for the step in the run."
            )
        self._wait(timeout)
        self._tell()
        if self._error is not None:
            raise self._error
        assert self._checkpoint is not None
        return self._checkpoint

    def _is_under_way(self) -> bool:
        """Whether it works in this process now."""
        return self._thread.is_alive() and not self._is_of_another_process()

    def _is_of_another_process(self) -> bool:
        """Whether this is the copy that a fork made of a save under way: its thread did not come along."""
        return self._process != os.getpid() and self._checkpoint is None and self._error is None

    def _wait(self, timeout: float | None = None) -> None:
        if self._is_of_another_process():
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the save of step {self.step} of run {self.run!r} is still under way.")

    def _settle(self) -> None:
        """Wait; raise the error if nobody was told of it yet."""
        self._wait()
        error, told = self._error, self._told
        self._tell()
        if error is None or told:
            return
        if isinstance(error, CheckpointError):
            text = f"the save of step {self.step} of run {self.run!r} failed in the background: {error}"
            raise retold(error, text) from error
        raise error

    def _tell(self) -> None:
        self._told = True
        _under_way.discard(self)

    def _save(self) -> None:
        try:
            # Taken out, and handed over as an argument: nothing but the work may keep the copy of the state alive.
            self._checkpoint = self._work(self._snapshot.pop())
        except BaseException as error:  # handed over to result(), the next save, or the end of the interpreter
            traceback.clear_frames(error.__traceback__)  # these hold it as well
            self._error = error
        finally:
            if self._error is None:
                _under_way.discard(self)


_under_way: set[PendingSave] = set()
"""Saves that have not ended, or that have failed and nobody was told."""


def _finish_all() -> None:
    """Wait for what is under way, and print what failed and was never asked for."""
    for pending in sorted(_under_way, key=lambda pending: pending.step):
        if pending._thread.ident is None:
            continue  # it could not be started, which its caller was told
        pending._thread.join()
        if pending._error is not None and not pending._told:
            print(
                f"ckptstore: the save of step {pending.step} of run {pending.run!r} FAILED in the background, and "
                f"nobody asked for its result: {type(pending._error).__name__}: {pending._error}",
                file=sys.stderr,
                flush=True,
            )


def _at_exit(hook: Callable[[], Any]) -> None:
    """Run `hook` when the interpreter begins to end, before it stops the thread pools that asyncio resolves names with.

    The hook of `threading` that `concurrent.futures` uses for its own pools has no public name; `atexit` comes later.
    """
    import concurrent.futures.thread  # noqa: F401  its hook must be registered before ours, to run after it

    register = getattr(threading, "_register_atexit", atexit.register)
    register(hook)


_at_exit(_finish_all)
os.register_at_fork(after_in_child=_under_way.clear)
