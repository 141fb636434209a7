"""What must hold while an input from others is read: documented errors, bounded time and memory, no key, file or code
beyond the store's own. `watch` does something and tells what did not hold.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ckptstore import errors
from ckptstore.format import ChunkKey, ManifestKey, TagKey
from ckptstore.testing.wrappers import Call

CPU_SECONDS = 2.0
CPU_BYTES_PER_SECOND = 50e6
"""How fast what a manifest rightly says there is may be read: a checkpoint may be large."""
HANG_SECONDS = 60.0
FREE_BYTES = 8 * 2**20
BYTES_FOR_BYTE = 250
"""What one byte of JSON may take: `[],` is a list in Python, and `show` makes a row of it."""

_FORBIDDEN = re.compile(
    r"exec|compile|import|marshal\..*|pickle\..*|code\.__new__|subprocess\..*|os\.(exec|fork|forkpty|posix_spawn|"
    r"spawn|startfile|system|chown|symlink).*|pty\..*|socket\.(connect|bind|getaddrinfo|send).*|ctypes\..*|urllib.*"
)
_OF_FILES = ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate")
_OBJECT = re.compile(r"ckptstore\.json|(sessions|condemned)/[0-9a-f]{32}\.json|scratch/[0-9a-f]{32}")
_PREFIX = re.compile(
    r"(runs|tags)/([A-Za-z0-9_][A-Za-z0-9._+=,-]{0,127}/)?|(chunks|deltas)/([0-9a-f]{2}/([0-9a-f]{64})?)?"
    r"|sessions/|condemned/|scratch/[0-9a-f]{31}"
)


@dataclass(slots=True)
class Watched:
    """What came of one input.

    Attributes:
        outcome: "read", or the name of the error that came out.
        escapes: what did not hold; empty if all is well.
        seconds: CPU time.
        peak_bytes: memory, beyond what was held before.
    """

    outcome: str = "read"
    escapes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0


class Hang(BaseException):
    """An input took so long that it was given up."""


class _Guard:
    """Audit hooks cannot be taken away again, so there is one, which looks only while it is told to."""

    def __init__(self) -> None:
        self.is_on = False
        self.folder = ""
        self.seen: list[str] = []
        self._is_installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if _FORBIDDEN.fullmatch(event):
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event in _OF_FILES and isinstance(arguments[0], str | bytes | Path):
            named = os.path.realpath(os.fsdecode(arguments[0]))
            if not (self.folder and f"{named}/".startswith(f"{self.folder}/")):
                self.seen.append(f"{event} {named[:200]}")

    @contextlib.contextmanager
    def watching(self, folder: str) -> Iterator[None]:
        if not self._is_installed:
            sys.addaudithook(self)
            self._is_installed = True
        self.seen.clear()
        self.folder, self.is_on = folder, True
        try:
            yield
        finally:
            self.is_on = False


_guard = _Guard()


def watch(
    act: Callable[[], Any],
    *,
    size: int,
    claimed_bytes: int = 0,
    folder: str = "",
    calls: Callable[[], Sequence[Call]] = tuple,
    listed: frozenset[str] = frozenset(),
) -> Watched:
    """Do `act` and tell what came of it.

    Args:
        act: reads the input; what it raises is its outcome. What it returns, if that is a text, is an escape.
        size: length of the input.
        claimed_bytes: what reading it may rightly take beside.
        folder: the only one that may be opened in.
        calls: what the backend was asked for.
        listed: keys that stand in the store, whatever they look like.
    """
    found = Watched()
    tracemalloc.start()
    begun = time.process_time()
    try:
        with _guard.watching(folder), _given_up():
            told = act()
        if isinstance(told, str):
            found.escapes.append(told)
    except errors.CheckpointError as error:
        found.outcome = type(error).__name__
        if type(error) not in vars(errors).values() or type(error) is errors.CheckpointError:
            found.escapes.append(f"an error of the type {found.outcome}, which is not documented")
        if len(str(error)) > 20_000 + size:
            found.escapes.append(f"an error whose text has {len(str(error))} characters")
    except Hang:
        found.outcome = "Hang"
        found.escapes.append(f"gave up after {HANG_SECONDS} s")
    except MemoryError as error:
        # docs/reference/api.md: a checkpoint may be larger than the memory.
        found.outcome = "MemoryError"
        if claimed_bytes < 2**40:
            found.escapes.append(_told(error))
    except BaseException as error:
        found.outcome = type(error).__name__
        found.escapes.append(_told(error))
    found.seconds = time.process_time() - begun
    found.peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found.escapes += [f"did {event}" for event in _guard.seen]
    if found.seconds > CPU_SECONDS + claimed_bytes / CPU_BYTES_PER_SECOND:
        found.escapes.append(f"took {found.seconds:.1f} s")
    if found.peak_bytes > FREE_BYTES + BYTES_FOR_BYTE * size + claimed_bytes:
        found.escapes.append(f"took {found.peak_bytes} bytes for {size}, which claim {claimed_bytes}")
    found.escapes += [
        f"asked for {call.operation} {call.key[:200]!r}" for call in calls() if not _is_ours(call, listed)
    ]
    return found


def _is_ours(call: Call, listed: frozenset[str]) -> bool:
    if call.operation in ("list", "children"):
        return _PREFIX.fullmatch(call.key) is not None
    keys = call.key.split() if call.operation == "sync" else [call.key]
    parsers = (ChunkKey.parse, ManifestKey.parse, TagKey.parse, _OBJECT.fullmatch)
    return all(key in listed or any(parse(key) for parse in parsers) for key in keys)


def _told(error: BaseException) -> str:
    """The type, the text, and the last places of the code where it came from."""
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:]]
    return f"raised {type(error).__name__}: {str(error)[:300]} ({' '.join(places)})"


@contextlib.contextmanager
def _given_up() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
