"""The protocol's operations carried out on a backend, on threads, with the session kept beating meanwhile.

What to do in which order is for `protocol` to say. Needs no torch: chunks are anything that can be read.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from ckptstore import protocol
from ckptstore.chunk import Base, encode_over
from ckptstore.chunk import digest as digest_of
from ckptstore.chunk import encode as encode_chunk
from ckptstore.decoding import decode_chain, each_of_chain, get_chain
from ckptstore.deltas import Held
from ckptstore.errors import CorruptError, InvalidInputError, MissingChunkError, UnavailableError
from ckptstore.format import RUNS, Codec, chunk_key, session_key
from ckptstore.kernels import ByteArray
from ckptstore.manifest import ChunkRef, Session, encode
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.objects.open import store_time
from ckptstore.pipeline import MAX_INFLIGHT_BYTES, Progress, Stage, each, staged
from ckptstore.protocol.operations import in_batches

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

    def __init__(
        self,
        objects: Objects,
        chunks: Mapping[str, RawChunk] | None = None,
        codec: Codec = "fast",
        threads: int = 1,
        progress: Progress | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        """What uploads need.

        chunks: what `protocol.Upload` may ask for, by digest.
        codec: how to encode them.
        threads: how many to encode with.
        progress: called with the raw bytes of the chunks put so far, and of those to be put in all.
        before_commit: called when all is uploaded and nothing is visible yet; what it raises ends the save there.
        """
        self._objects = objects
        self._chunks = chunks or {}
        self._codec: Codec = codec
        self._threads = threads
        self._progress = progress
        self._before_commit = before_commit
        self.damaged: list[CorruptError] = []
        """Bases that turned out corrupt or missing; what was to stand on them was stored in full."""
        self._heart: _Heart | None = None
        self._clock_ahead: float | None = None

    def perform(self, steps: Generator[protocol.Operation, Any, T]) -> T:
        """Run a generator of the protocol to its end and return what it returns; what fails is thrown into it.

        A session that it leaves open when it returns beats on, until another one closes it, or `abandon` is called.
        """
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
        except BaseException:
            self._stop_heart()
            raise

    def hand_over(self, chunks: Mapping[str, RawChunk]) -> None:
        """What `protocol.Upload` may ask for from now on."""
        self._chunks = chunks

    def abandon(self) -> None:
        """Let the open session, if there is one, be closed soon; asks for nothing itself, and may be called anywhere.

        For a save that can never commit any more.
        """
        if self._heart is not None:
            self._heart.abandon()
            self._heart = None

    def _do(self, operation: protocol.Operation) -> Any:
        match operation:
            case protocol.List(prefixes):
                return self._list(prefixes)
            case protocol.Get(keys):
                return each(self._objects.get, keys, threads=self._objects.request_threads)
            case protocol.Create(key, content):
                if self._before_commit is not None and key.startswith(RUNS):
                    self._before_commit()
                return self._objects.create(key, content)
            case protocol.Put(key, content):
                return self._objects.put(key, content)
            case protocol.Open(session):
                self._objects.put(session_key(session.save), encode(session))
                # Known before it starts: an interrupt must not leave one that nobody can stop.
                self._heart = _Heart(self._objects, session)
                self._heart.start()
            case protocol.Close(save_id):
                self._stop_heart()
                self._objects.delete(session_key(save_id))
            case protocol.Upload(save_id, digests, bases, below):
                return self._upload(save_id, digests, bases, below)
            case protocol.Check(chunk):
                return self._is_good(chunk)
            case protocol.Sync(keys):
                return self._objects.sync(keys)
            case protocol.Delete(keys):
                batches = list(in_batches(keys, self._objects.delete_batch))
                each(self._objects.delete_many, batches, threads=self._objects.request_threads)
            case protocol.Clock(about):
                return self._now(about=about)
            case protocol.Pause(seconds):
                time.sleep(seconds)

    def _now(self, *, about: bool) -> float:
        """The store's time. Asked once; then our own clock, one that only goes forward, counts from there."""
        if self._clock_ahead is None:
            try:
                now = store_time(self._objects)
            except UnavailableError:
                if not about:
                    raise
                now = time.time()
            self._clock_ahead = now - time.monotonic()
        return self._clock_ahead + time.monotonic()

    def _list(self, prefixes: Sequence[str]) -> list[ObjectInfo]:
        found = each(self._objects.list, prefixes, threads=self._objects.request_threads)
        return [row for rows in found for row in rows]

    def _upload(
        self, save_id: str, digests: Sequence[str], bases: Mapping[str, Held], below: Mapping[str, int]
    ) -> dict[str, protocol.Uploaded]:
        def fetched(name: str) -> tuple[str, Sequence[bytes] | CorruptError | None]:
            if name not in bases:
                return name, None
            try:
                return name, get_chain(self._objects, _refs(bases[name]))
            except MissingChunkError as error:
                return name, error
            except UnavailableError:  # such as a bad sector below the base: no reason for a save to fail
                return name, None

        def encoded(taken: tuple[str, Sequence[bytes] | CorruptError | None]) -> tuple[str, Any, bool, str | None]:
            name, contents = taken
            chunk = self._chunks[name]
            raw = chunk.read()
            base = None if contents is None else self._base(bases[name], contents)
            damaged = bases[name].key if contents is not None and base is None else None
            if base is None:
                content, is_delta = encode_chunk(raw, chunk.element, self._codec), False
            else:
                content, is_delta = encode_over(raw, chunk.element, base, if_any=name in below)
            # After the encoding, so that nothing that was written meanwhile goes unseen.
            if not chunk.private and digest_of(raw) != name:
                raise InvalidInputError(
                    "the state changed while it was saved, so nothing was committed. Do not train on in another "
                    "thread during run.save(…), or use run.save_async(…), which copies the state first."
                )
            return name, content, is_delta, damaged

        def put(made: tuple[str, Any, bool, str | None]) -> protocol.Uploaded | None:
            name, content, is_delta, damaged = made
            if name in below and len(content) > below[name]:
                return None
            self._objects.put(chunk_key(name, save_id, is_delta=is_delta), memoryview(content))
            return protocol.Uploaded(len(content), is_delta, damaged)

        if bases and self._objects.gets_wait:
            stages = [Stage(fetched, self._objects.request_threads), Stage(encoded, self._threads)]
        else:
            stages = [Stage(lambda name: encoded(fetched(name)), self._threads)]
        uploaded = staged(
            digests,
            [*stages, Stage(put, self._objects.request_threads)],
            # The raw bytes if they had to be copied, the planes, the object; of a base its objects and its raw bytes.
            weigh=lambda name: (4 + len(bases[name].chain) if name in bases else 3) * self._chunks[name].raw_bytes,
            max_inflight_bytes=MAX_INFLIGHT_BYTES,
            done=self._counted(digests),
        )
        return {name: told for name, told in zip(digests, uploaded, strict=True) if told is not None}

    def _counted(self, digests: Sequence[str]) -> Callable[[str], None] | None:
        if (progress := self._progress) is None:
            return None
        total, put = sum(self._chunks[name].raw_bytes for name in digests), 0

        def count(name: str) -> None:
            nonlocal put
            put += self._chunks[name].raw_bytes
            progress(put, total)

        return count

    def _base(self, held: Held, contents: Sequence[bytes] | CorruptError) -> Base | None:
        """The verified bytes of a base; None if it is damaged, which is no reason for a save to fail."""
        raw = np.empty(held.raw, np.uint8)
        try:
            if isinstance(contents, CorruptError):
                raise contents
            decode_chain(_refs(held), contents, raw, verify_each=True)
        except CorruptError as error:
            self.damaged.append(error)
            return None
        return Base(held.digest, raw)

    def _is_good(self, held: Held) -> bool:
        chain = _refs(held)
        try:
            decode_chain(chain, each_of_chain(self._objects, chain), np.empty(held.raw, np.uint8))
        except CorruptError:
            return False
        return True

    def _stop_heart(self) -> None:
        if self._heart is not None:
            self._heart.stop()
            self._heart = None


def _refs(held: Held) -> list[ChunkRef]:
    """A chain in the form that decoding takes."""
    return [
        ChunkRef(
            digest=link.digest,
            save=link.save,
            raw=link.raw,
            stored=link.stored,
            base=None if link.base is None else 0,  # that it has one is all that counts here
        )
        for link in held.chain
    ]


class _Heart:
    """Puts a session again and again, so that a collector sees that its save is alive."""

    def __init__(self, objects: Objects, session: Session) -> None:
        self._objects = objects
        self._session = session
        self._stopped = threading.Event()
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._beat, name="ckptstore-heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._session = msgspec.structs.replace(self._session, beat=self._session.beat + 1)
            # A beat that is lost costs the save at worst, never a chunk; what fails for good shows elsewhere.
            with contextlib.suppress(UnavailableError):
                self._objects.put(session_key(self._session.save), encode(self._session))
        if self._is_abandoned:
            with contextlib.suppress(UnavailableError):  # a session without a save ends by itself
                self._objects.delete(session_key(self._session.save))

    def abandon(self) -> None:
        """Let the thread close the session, and end."""
        self._is_abandoned = True
        self._stopped.set()

    def stop(self) -> None:
        """Return when no beat is under way any more: none may put the session back after it was deleted."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
