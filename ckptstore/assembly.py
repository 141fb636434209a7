"""From the chunks of a checkpoint to tensors in memory: each chunk fetched once, verified, written where it belongs.

The counterpart of segments.py. Knows manifests and memory; which tensors are wanted, and what they are for, is told.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import blake3
import numpy as np
import torch

from ckptstore import blocks as boxes
from ckptstore import chunk
from ckptstore.decoding import decode_chain, each_of_chain, get_chain_unchecked, named
from ckptstore.errors import CorruptError, InvalidInputError
from ckptstore.kernels import ByteArray, compiled
from ckptstore.manifest import ChunkRef, Manifest, Placed, Segment
from ckptstore.objects.base import Objects
from ckptstore.peers import Group, Peers
from ckptstore.pipeline import MAX_INFLIGHT_BYTES, Stage, staged
from ckptstore.sharing import Work, share
from ckptstore.skeleton import TensorNode, contiguous_stride
from ckptstore.tree import TORCH_DTYPES

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a chunk, from `offset` on, that are a box of `shape`; what of it goes where."""

    offset: int
    shape: tuple[int, ...]
    taken: tuple[slice, ...]
    into: "np.ndarray[Any, np.dtype[np.uint8]]"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A box of an array of bytes, which begins at `start` of a segment, or is put together of its blocks."""

    segment: int
    start: int
    shape: tuple[int, ...]
    box: boxes.Box
    into: "np.ndarray[Any, np.dtype[np.uint8]]"


@dataclass(slots=True)
class _Job:
    """One chunk to fetch with what it stands on, and every place that its bytes go to."""

    index: int
    chain: list[ChunkRef]
    """In the order of decoding; the last is the chunk itself, those before it are there only for a delta."""
    wholes: list[ByteArray] = field(default_factory=list)
    parts: list[tuple[int, ByteArray]] = field(default_factory=list)
    """Offset in the chunk, and where the bytes from there on go."""
    boxes: list["_Piece"] = field(default_factory=list)
    """What does not lie side by side where it goes."""

    @property
    def raw(self) -> int:
        return self.chain[-1].raw

    @property
    def stored(self) -> int:
        return sum(ref.stored for ref in self.chain)

    @property
    def held_bytes(self) -> int:
        """What is held while it is under way: the objects, the planes of one, its base, and itself if it is copied."""
        is_delta = len(self.chain) > 1
        return self.stored + (1 + is_delta + (not self.wholes)) * self.raw

    def new_room(self) -> ByteArray:
        """Where its raw bytes go first: to the first place that takes them as a whole, if there is one."""
        return self.wholes[0] if self.wholes else np.empty(self.raw, np.uint8)

    def place(self, raw: ByteArray) -> None:
        """Copy its raw bytes from there to all the others."""
        for memory in self.wholes[1:]:
            memory[:] = raw
        for offset, memory in self.parts:
            memory[:] = raw[offset : offset + len(memory)]
        for piece in self.boxes:
            held = raw[piece.offset : piece.offset + math.prod(piece.shape)].reshape(piece.shape)
            piece.into[...] = held[piece.taken]


class Assembly:
    """The wanted segments of one manifest: memory for each, and the tensors in it once it is filled."""

    def __init__(self, manifest: Manifest, device: "torch.device | str" = "cpu") -> None:
        """`device`: where tensors are put that have no place of their own."""
        self.manifest = manifest
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise InvalidInputError(f"{device!r} is no device: {error}") from error
        self.has_written = False
        """Whether any wanted memory may have been written to."""
        self._memory: dict[int, ByteArray] = {}
        self._boxes: list[_Wanted] = []
        self._storages: dict[int, torch.Tensor] = {}
        self._moved: dict[int, torch.Tensor] = {}

    def want(self, node: TensorNode) -> None:
        """Make room for the segment of `node`."""
        if node.segment in self._memory:
            return
        length = self.manifest.segments[node.segment].bytes
        try:
            self._memory[node.segment] = _new_memory(length)
        except MemoryError as error:
            raise MemoryError(f"{length} bytes for one tensor of {self._name()}: {error}") from error

    def want_into(self, node: TensorNode, memory: ByteArray) -> None:
        """Let the segment of `node` be written straight into `memory`, which is exactly as long."""
        self._memory[node.segment] = memory

    def want_box(self, node: TensorNode, box: boxes.Box, into: "np.ndarray[Any, np.dtype[np.uint8]]") -> bool:
        """Let a box of the tensor `node` be written into an array of bytes, which has one dimension more: an item's.

        Only chunks that hold a part of it will be fetched, and only verified bytes are written.

        Returns:
            Whether that can be done; if not, `want` the whole tensor, whose elements lie in another order.
        """
        segment = self.manifest.segments[node.segment]
        bytes_box = (*box[0], 0), (*box[1], node.item_bytes)
        shape = (*node.shape, node.item_bytes)
        is_array = segment.shape is None or (tuple(segment.shape) == node.shape and segment.bytes == node.span_bytes)
        if node.stride is not None or not is_array or node.tag != "tensor":
            return False
        self._boxes.append(_Wanted(node.segment, node.offset, shape, bytes_box, into))
        return True

    def fill(
        self,
        objects: Objects,
        threads: int,
        progress: Callable[[int], None] | None = None,
        peers: Peers | None = None,
    ) -> None:
        """Fetch, verify and write every wanted segment.

        Args:
            objects: where the chunks are.
            threads: how many decode.
            progress: called with the stored bytes of each chunk that is done.
            peers: processes that want the same, all of them: each chunk is fetched by one of them.

        Raises:
            CorruptError: a chunk is not what was saved, or (MissingChunkError) is not there; it names the tensors.
            UnavailableError: the backend failed, or the peers have lost each other.
        """
        jobs = self._jobs()
        compiled.expect(sum(len(job.chain) * job.raw for job in jobs))
        done = (lambda job: progress(job.stored)) if progress else None
        if isinstance(peers, Group):
            self._fill_together(jobs, objects, threads, done, peers)
            return
        if objects.gets_wait:
            stages = [
                Stage(lambda job: (job, self._fetch(objects, job)), objects.request_threads),
                Stage(lambda fetched: self._write(objects, *fetched), threads),
            ]
        else:
            # On one thread a chunk is still in its cache when it is decoded, and its memory is used for the next one.
            stages = [Stage(lambda job: self._write(objects, job, self._fetch(objects, job)), threads)]
        staged(jobs, stages, weigh=lambda job: job.held_bytes, max_inflight_bytes=MAX_INFLIGHT_BYTES, done=done)

    def wanted(self) -> str:
        """By what to tell whether another process wants the same chunks: a digest of their names, in order."""
        names = "".join(job.chain[-1].key for job in self._jobs())
        return blake3.blake3(names.encode()).hexdigest()

    def _fill_together(
        self, jobs: Sequence[_Job], objects: Objects, threads: int, done: Callable[[_Job], None] | None, peers: Group
    ) -> None:
        """Raw bytes go from process to process, so that each chunk is also decoded only once."""
        self.has_written = True
        share(
            jobs,
            peers,
            Work(
                room=lambda job: job.new_room(),
                make=lambda job, raw: self._decode(objects, job, self._fetch(objects, job), raw),
                is_whole=lambda job, raw: chunk.digest(raw) == job.chain[-1].digest,
                place=lambda job, raw: job.place(raw),
                weigh=lambda job: job.held_bytes,
                done=done,
            ),
            making_threads=objects.request_threads if objects.gets_wait else threads,
            threads=threads,
        )

    def _fetch(self, objects: Objects, job: _Job) -> list[bytes]:
        with named(self.manifest, job.index):
            return get_chain_unchecked(objects, job.chain)

    def _write(self, objects: Objects, job: _Job, contents: list[bytes]) -> None:
        self.has_written = True
        raw = job.new_room()
        self._decode(objects, job, contents, raw)
        job.place(raw)

    def _decode(self, objects: Objects, job: _Job, contents: list[bytes], raw: ByteArray) -> None:
        with named(self.manifest, job.index):
            try:
                decode_chain(job.chain, contents, raw)
            except CorruptError:
                # Once more: it may be the way, not the object, that is bad. If not, which object it is.
                contents.clear()
                decode_chain(job.chain, each_of_chain(objects, job.chain), raw, verify_each=True)

    def value(self, node: TensorNode) -> Any:
        """The tensor, array or bytes object that `node` describes, in its segment's memory. Only after `fill`."""
        memory = self._memory[node.segment]
        if node.tag == "blob":
            return memory[node.offset : node.offset + node.span_bytes].tobytes()
        if node.tag == "ndarray":
            flat = memory[node.offset : node.offset + node.span_bytes]
            return flat.view(np.dtype(node.dtype)).reshape(node.shape)
        return self._tensor(node)

    def stored_bytes(self) -> int:
        """What `fill` will fetch."""
        return sum(job.stored for job in self._jobs())

    def _tensor(self, node: TensorNode) -> torch.Tensor:
        storage = self._storages.get(node.segment)
        if storage is None:
            storage = self._storages[node.segment] = torch.from_numpy(self._memory[node.segment])
        if self._device.type != "cpu":
            # The whole segment, so that tensors that share memory go on sharing it.
            if node.segment not in self._moved:
                self._moved[node.segment] = storage.to(self._device)
            storage = self._moved[node.segment]
        dtype = TORCH_DTYPES[node.dtype]
        try:
            tensor = torch.empty(0, dtype=dtype, device=storage.device)
            stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
            tensor.set_(storage.untyped_storage(), node.offset // dtype.itemsize, node.shape, stride)
            if node.parameter:
                return torch.nn.Parameter(tensor, requires_grad=node.requires_grad)
            return tensor.requires_grad_(node.requires_grad)
        except RuntimeError as error:
            raise CorruptError(f"{self._name()} describes a tensor that torch cannot make ({node}): {error}") from error

    def _jobs(self) -> list[_Job]:
        jobs: dict[int, _Job] = {}

        def job_of(index: int) -> _Job:
            return jobs.setdefault(index, _Job(index, self.manifest.chain(index)))

        wanted = list(self._boxes)
        for number, memory in sorted(self._memory.items()):
            segment = self.manifest.segments[number]
            if segment.shape is not None:
                shape = (*segment.shape, segment.item_bytes)
                wanted.append(_Wanted(number, 0, shape, ((0,) * len(shape), shape), memory.reshape(shape)))
                continue
            for placed in self.manifest.placed(number):
                job = job_of(placed.chunk)
                if segment.offset is not None:
                    job.parts.append((placed.offset, memory))
                else:
                    job.wholes.append(memory[placed.start : placed.stop])
        for want in wanted:
            segment = self.manifest.segments[want.segment]
            folded, folding = _folded(want, segment)
            for placed in self.manifest.placed(want.segment):
                if pieces := list(_pieces(folded, placed, segment, folding)):
                    job_of(placed.chunk).boxes.extend(pieces)
        return list(jobs.values())

    def _name(self) -> str:
        return f"step {self.manifest.step} of run {self.manifest.run!r}"


def _new_memory(length: int) -> ByteArray:
    """Memory for a segment, aligned as torch aligns its own: what MKL computes may depend on it to the last bit.

    From NumPy, which asks the system for huge pages: faulting in ordinary ones was a third of a restore's time.
    """
    room = np.empty(length + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + length]


def _folded(want: _Wanted, segment: Segment) -> tuple[_Wanted, boxes.Folding | None]:
    """The same in as few dimensions as can be, so that a manifest with very many of them is not more work."""
    if not want.into.flags.c_contiguous:
        return want, None  # memory of the user's: so many dimensions have its tensors
    held = (((*block.at, 0), (*block.shape, segment.item_bytes)) for block in segment.blocks or ())
    folding = boxes.fold(want.shape, [want.box, *held])
    box = folding.box(want.box)
    return replace(want, shape=folding.sizes(want.shape), box=box, into=want.into.reshape(box[1])), folding


def _pieces(want: _Wanted, placed: Placed, segment: Segment, folding: boxes.Folding | None) -> Iterator[_Piece]:
    """What a chunk holds of a box that is wanted, both folded."""
    if segment.shape is None:
        length = math.prod(want.shape)
        first, start, stop = placed.offset, placed.start - want.start, placed.stop - want.start
        if start < 0:  # what comes before the tensor in its segment
            first, start = first - start, 0
        shape, stop = want.shape, min(stop, length)
        at: tuple[int, ...] = (0,) * len(shape)
    else:
        (at, shape), first = placed.box, placed.offset
        at, shape, start, stop = (*at, 0), (*shape, segment.item_bytes), placed.start, placed.stop
        at, shape = folding.box((at, shape)) if folding else (at, shape)
        if boxes.common(want.box, (at, shape)) is None:
            return
    for box, before in boxes.boxes_of_range(shape, start, stop):
        there = boxes.moved(box, at)
        if (taken := boxes.common(there, want.box)) is not None:
            yield _Piece(first + before, box[1], boxes.within(taken, there), want.into[boxes.within(taken, want.box)])
