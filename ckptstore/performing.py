"""The protocol's operations carried out on a backend, on threads, with the session kept beating meanwhile.

What to do in which order is protocol.py's. Needs no torch: chunks are anything that can be read.
"""

import contextlib
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from ckptstore import protocol
from ckptstore.chunk import digest as digest_of
from ckptstore.chunk import encode as encode_chunk
from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.format import chunk_key, session_key
from ckptstore.kernels import ByteArray
from ckptstore.manifest import Session, encode
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.pipeline import MAX_INFLIGHT_BYTES, Stage, each, staged, worker_threads

BEAT_SECONDS = 20.0

T = TypeVar("T")


class RawChunk(Protocol):
    """What `Upload` needs of a chunk."""

    @property
    def element(self) -> int:
        """Bytes of one number in it: 1, 2, 4 or 8."""

    @property
    def raw_bytes(self) -> int:
        """Its length."""

    @property
    def private(self) -> bool:
        """Whether nobody else can write to its memory."""

    def read(self) -> ByteArray:
        """Its bytes, contiguous."""


class Performer:
    """Carries the protocol's operations out on a backend."""

    def __init__(self, objects: Objects, chunks: Mapping[str, RawChunk] | None = None) -> None:
        """`chunks`: what `protocol.Upload` may ask for, by digest."""
        self._objects = objects
        self._chunks = chunks or {}
        self._heart: _Heart | None = None

    def perform(self, steps: Generator[protocol.Operation, Any, T]) -> T:
        """Run a generator of the protocol to its end and return what it returns; what fails is thrown into it."""
        try:
            operation = next(steps)
            while True:
                try:
                    answer = self._do(operation)
                except (Exception, KeyboardInterrupt) as error:  # the protocol decides what a failure means
                    operation = steps.throw(error)
                else:
                    operation = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            self._stop_heart()

    def _do(self, operation: protocol.Operation) -> Any:
        match operation:
            case protocol.List(prefixes):
                return self._list(prefixes)
            case protocol.Get(keys):
                return each(self._objects.get, keys, threads=self._objects.request_threads)
            case protocol.Create(key, content):
                return self._objects.create(key, content)
            case protocol.Put(key, content):
                return self._objects.put(key, content)
            case protocol.Open(session):
                self._objects.put(session_key(session.save), encode(session))
                self._heart = _Heart(self._objects, session)
            case protocol.Close(save_id):
                self._stop_heart()
                self._objects.delete(session_key(save_id))
            case protocol.Upload(save_id, digests):
                return self._upload(save_id, digests)
            case protocol.Sync(keys):
                return self._objects.sync(keys)

    def _list(self, prefixes: Sequence[str]) -> list[ObjectInfo]:
        found = each(self._objects.list, prefixes, threads=self._objects.request_threads)
        return [row for rows in found for row in rows]

    def _upload(self, save_id: str, digests: Sequence[str]) -> dict[str, int]:
        def encoded(name: str) -> tuple[str, Any]:
            chunk = self._chunks[name]
            raw = chunk.read()
            content = encode_chunk(raw, chunk.element)
            # After the encoding, so that nothing that was written meanwhile goes unseen.
            if not chunk.private and digest_of(raw) != name:
                raise InvalidInputError(
                    "the state changed while it was saved, so nothing was committed. Do not train on in another "
                    "thread during run.save(…), or use run.save_async(…), which copies the state first."
                )
            return name, content

        def put(pair: tuple[str, Any]) -> int:
            name, content = pair
            self._objects.put(chunk_key(name, save_id), memoryview(content))
            return len(content)

        sizes = staged(
            digests,
            [Stage(encoded, worker_threads()), Stage(put, self._objects.request_threads)],
            # The raw bytes if they had to be copied, the planes, the object.
            weigh=lambda name: 3 * self._chunks[name].raw_bytes,
            max_inflight_bytes=MAX_INFLIGHT_BYTES,
        )
        return dict(zip(digests, sizes, strict=True))

    def _stop_heart(self) -> None:
        if self._heart is not None:
            self._heart.stop()
            self._heart = None


class _Heart:
    """Puts a session again and again, so that a collector sees that its save is alive."""

    def __init__(self, objects: Objects, session: Session) -> None:
        self._objects = objects
        self._session = session
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ckptstore-heart", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._session = msgspec.structs.replace(self._session, beat=self._session.beat + 1)
            # A beat that is lost costs the save at worst, never a chunk; what fails for good shows elsewhere.
            with contextlib.suppress(UnavailableError):
                self._objects.put(session_key(self._session.save), encode(self._session))

    def stop(self) -> None:
        """Return when no beat is under way any more: none may put the session back after it was deleted."""
        self._stopped.set()
        self._thread.join()
