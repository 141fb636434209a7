"""The storage writer: what each rank stores, and how the coordinator opens and ends the save. See dcp.py."""

import io
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptstore import protocol, saving, tagging
from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import CheckpointError, CorruptError, InvalidInputError, retold
from ckptstore.format import Codec, check_tag, new_joint_save_id, part_id
from ckptstore.integrations._dcp_place import Place, is_checkpoint_id
from ckptstore.manifest import Manifest, Marker, content_digest, decode_manifest, encode
from ckptstore.performing import Performer
from ckptstore.pipeline import Progress, beside
from ckptstore.shards import MAX_CARRIED_BYTES, Part, Shard, Terms, Tree, Value, Whole
from ckptstore.store import Store
from ckptstore.tree import TORCH_DTYPES, unflatten
from ckptstore.writer import now_text, this_writer


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the coordinator of an item, and of which save."""

    save: str
    what: Shard | Value


class _Arrived(threading.local):
    terms: Terms | None = None


_arrived = _Arrived()
"""What the coordinator has told this rank of the save that this thread is about: planning and writing are one thread's.

Not taken from the plan that `write_data` is given: planners that cache plans hand over that of an earlier save there.
"""


@dataclass(frozen=True, slots=True)
class _Sent:
    """Terms on their way to a rank: noted when they arrive, whatever becomes of the plan that they come with."""

    terms: Terms

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.terms,)


def _arrive(terms: Terms) -> Terms:
    _arrived.terms = terms
    return terms


@dataclass(slots=True)
class _Session:
    """The save that the coordinator has begun."""

    request: protocol.JointRequest
    marker: Marker
    performer: Performer


class CkptstoreWriter(StorageWriter):
    """Where `dcp.save` and `dcp.async_save` put a checkpoint: a step of a run of a ckptstore store.

    Each rank hashes, compresses and uploads what DCP's planner gives it; what the store holds already is not uploaded.
    Rank 0 commits when all ranks are done. If any rank fails, no checkpoint is made, and every rank raises DCP's
    CheckpointException, with the error of each rank that failed in its `failures`.

    One writer may save many steps: `dcp.save(…, checkpoint_id="llama@200", storage_writer=writer)`, or "200" alone.

    Args:
        store: a path or URL, as for `ckptstore.Store`; or a `Store`.
        run: the name of the run.
        step: the step.
        metrics: as for `Run.save`.
        metadata: as for `Run.save`.
        tags: names to tag the checkpoint with once it is committed.
        replace: as for `Run.save`: put this state in the place of another one that was saved as the same step.
        storage_options: as for `Store`.
        codec: "fast" or "none", as for `Store`. "small" saves as "fast" does: `Run.compact` makes differences later.
        threads: how many hash and encode on each rank. None: the cores of the machine, divided by the ranks on it.
        progress: as for `Run.save`, of this rank.

    Raises:
        InvalidInputError: an argument makes no sense.
    """

    def __init__(
        self,
        store: "str | os.PathLike[str] | Store",
        *,
        run: str | None = None,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        replace: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        codec: Codec = "fast",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._place = Place(store, run, step, storage_options, codec, threads)
        self._notes = saving.take_apart(None, metrics, metadata)
        self._tags = [check_tag(tag) for tag in ([tags] if isinstance(tags, str) else tags)]
        self._replace = replace
        self._progress = progress
        self._session: _Session | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._checkpoint: Checkpoint | None = None

    def __repr__(self) -> str:
        return f"CkptstoreWriter({self._place.store.url!r}, {self._place.text})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_finalizer": None, "_checkpoint": None}

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What was saved last, on the rank that committed it; None elsewhere, and before."""
        return self._checkpoint

    @property
    def checkpoint_id(self) -> str:
        """RUN@STEP."""
        return self._place.text

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: "str | os.PathLike[str]") -> bool:
        """Whether it is RUN@STEP, or a step."""
        return is_checkpoint_id(checkpoint_id)

    def reset(self, checkpoint_id: "str | os.PathLike[str] | None" = None) -> None:
        """Begin anew, with another checkpoint if `checkpoint_id` is given."""
        self._abandon()
        if checkpoint_id:
            self._place.go_to(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        """What planners may want to know."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks: what DCP tells before it plans."""
        self._abandon()
        _arrived.terms = None
        self._checkpoint = None
        is_alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if not kwargs.get("use_collectives", True) and not is_alone and torch.distributed.get_world_size() > 1:
            raise InvalidInputError(
                "use_collectives=False would make each rank save a checkpoint of its own: leave it at True."
            )
        self._place.require_run()
        if self._place.step is None:
            raise InvalidInputError("no step is given: pass step=100, or checkpoint_id='100'.")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """All ranks: refuse what cannot be saved before anything is written."""
        for item in plan.items:
            dtype = None if item.tensor_data is None else item.tensor_data.properties.dtype
            if dtype is not None and dtype not in TORCH_DTYPES.values():
                raise InvalidInputError(
                    f"{item.index.fqn} has dtype {dtype}, which ckptstore does not know: view it as uint8."
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator: open the session, and tell every rank of it."""
        if len(plans) == 1 and _is_another_rank():
            raise InvalidInputError(
                f"rank {torch.distributed.get_rank()} saves by itself (no_dist=True, or a process group of its own), "
                "and others would save other states as the same step. Save with all ranks together, or in rank 0 "
                "alone, or with Run.save, each to a run of its own."
            )
        objects = self._place.objects
        marker = saving.ensure_store(objects)
        request = protocol.JointRequest(
            run=self._place.require_run(),
            step=self._place.step or 0,
            save=new_joint_save_id(),
            created=now_text(),
            writer=this_writer(),
        )
        performer = Performer(objects, codec=self._codec, threads=self._place.threads)
        newest = performer.perform(protocol.begin(request))
        self._session = _Session(request, marker, performer)
        # Nobody tells a writer that its save has failed elsewhere. When it goes, the session is not to beat on.
        self._finalizer = weakref.finalize(self, performer.abandon)
        terms = [
            Terms(
                save=request.save,
                upload=part_id(request.save, number),
                newest=newest,
                chunk_bytes=marker.chunk_bytes,
                small_bytes=marker.small_bytes,
                carried_bytes=MAX_CARRIED_BYTES // len(plans),
            )
            for number in range(len(plans))
        ]
        if len(plans) == 1:
            _arrive(terms[0])  # nothing is sent
        return [replace(plan, storage_data=_Sent(each)) for plan, each in zip(plans, terms, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All ranks: hash, encode and upload."""
        terms = _arrived.terms
        if terms is None:
            raise InvalidInputError(
                "nothing has arrived from the coordinator: dcp.save and dcp.async_save call this, in the thread that "
                f"has planned; and {type(planner).__name__} must leave SavePlan.storage_data to the storage writer."
            )
        try:
            part = Part(terms)
            for item in plan.items:
                _add(part, item, planner)
            stored = self._store(part)
        except BaseException:
            self._abandon()  # for the coordinator: this save can never commit
            raise
        results = [
            WriteResult(index=item.index, size_in_bytes=_size(what), storage_data=_Told(terms.save, what))
            for item, what in zip(plan.items, stored, strict=True)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _store(self, part: Part) -> list[Shard | Value]:
        objects, codec, threads, progress = self._place.objects, self._codec, self._place.threads, self._progress
        if threading.current_thread() is threading.main_thread():
            return part.store(objects, codec=codec, threads=threads, progress=progress)
        # Beside a training. The thread is DCP's, and its priority not ours to change.
        objects.connect()
        return beside(lambda: part.store(objects, codec=codec, threads=max(1, threads // 4), progress=progress))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: commit what all ranks have stored."""
        # Taken out first: another save with this writer must not close the session while this one commits.
        session, self._session = self._session, None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        if session is None:
            raise InvalidInputError(
                "there is no save to finish: dcp.save and dcp.async_save call this. Or the writer was used for the "
                "next save before this one had ended: wait for its future, or take another writer."
            )
        try:
            manifest = self._conclude(session, metadata, results)
        finally:
            session.performer.abandon()
        self._checkpoint = Checkpoint(manifest)
        metadata.storage_meta = self.storage_meta()
        for tag in self._tags:
            try:
                tagging.add(self._place.objects, manifest.run, manifest.step, tag)
            except CheckpointError as error:
                raise retold(
                    error, f"step {manifest.step} of run {manifest.run!r} is saved, and has no tag {tag!r} yet: {error}"
                ) from error

    def _conclude(self, session: _Session, metadata: Metadata, results: list[list[WriteResult]]) -> Manifest:
        told: dict[str, list[Any]] = {}
        for result in (result for of_rank in results for result in of_rank):
            if not isinstance(result.storage_data, _Told) or result.storage_data.save != session.request.save:
                raise InvalidInputError(f"what a rank tells of {result.index.fqn} belongs to another save. Save again.")
            told.setdefault(result.index.fqn, []).append(result.storage_data.what)
        tree, whole = Tree(), Whole()
        for key, path in _paths(metadata).items():
            what = told.get(key, [])
            described = metadata.state_dict_metadata[key]
            if what and isinstance(what[0], Value):
                tree.put(path, whole.add_value(what[0]))
            elif isinstance(described, TensorStorageMetadata):
                grad = bool(described.properties.requires_grad)
                tree.put(path, whole.add_tensor(key, described.size, what, requires_grad=grad))
            else:
                raise InvalidInputError(f"{key} is in the plan, and no rank has stored it.")
        skeleton = tree.skeleton()
        table, lengths, held, rest = whole.lay_out(
            chunk_bytes=session.marker.chunk_bytes,
            small_bytes=session.marker.small_bytes,
            threads=self._place.threads,
        )
        request = protocol.SaveRequest(
            run=session.request.run,
            step=session.request.step,
            save=session.request.save,
            created=session.request.created,
            writer=session.request.writer,
            metrics=self._notes.metrics,
            metadata=self._notes.metadata,
            content=content_digest(skeleton, table, list(lengths)),
            tree=skeleton,
            segments=table,
            chunks=lengths,
            raw_bytes=sum(segment.bytes for segment in table),
            replace=self._replace,
        )
        session.performer.hand_over(rest)
        return session.performer.perform(protocol.conclude(request, held, _require_readable))

    @property
    def _codec(self) -> Codec:
        codec = self._place.store._codec
        return "fast" if codec == "small" else codec

    def _abandon(self) -> None:
        """Let the session of a save that can never commit be closed; nothing if it is closed already."""
        session, self._session = self._session, None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        if session is not None:
            session.performer.abandon()


def _add(part: Part, item: WriteItem, planner: SavePlanner) -> None:
    key = item.index.fqn
    if item.type == WriteItemType.BYTE_IO:
        part.add_value(key, _value(item, planner))
        return
    tensor, described = planner.resolve_data(item), item.tensor_data
    if not isinstance(tensor, torch.Tensor) or described is None or tensor.shape != described.chunk.sizes:
        raise InvalidInputError(
            f"{key}: {type(planner).__name__}.resolve_data gives something else than its plan says. It may change a "
            "tensor's dtype, and nothing more."
        )
    part.add_shard(key, tensor, described.chunk.offsets, described.size)


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    """What is no tensor, as it is in the state. A planner's own way of writing it is asked for, and undone."""
    if isinstance(planner, DefaultSavePlanner) and all(
        getattr(type(planner), name) is getattr(DefaultSavePlanner, name)
        for name in ("resolve_data", "transform_object")
    ):
        return planner.lookup_object(item.index)
    written = planner.resolve_data(item)
    try:
        if not isinstance(written, io.BytesIO):
            raise TypeError(f"it is a {type(written).__name__}")
        written.seek(0)
        return torch.load(written, weights_only=True)
    except Exception as error:
        raise InvalidInputError(
            f"{item.index.fqn}: what {type(planner).__name__}.resolve_data makes of it is not torch.save of plain "
            f"values ({error}), and nothing else is kept, as reading it would run code. Leave such values to "
            "DefaultSavePlanner."
        ) from error


def _size(what: Shard | Value) -> int:
    return sum(stored.length for stored in ([what.stored] if isinstance(what, Shard) else what.stored))


def _paths(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    """How to come to each key in the state, as the planner has flattened it, and in the order of the state."""
    keys, mapping = metadata.state_dict_metadata, metadata.planner_data
    if not isinstance(mapping, dict):
        mapping = {}
    known = {key: path for key, path in mapping.items() if key in keys and isinstance(path, tuple) and path}
    return known | {key: (key,) for key in keys if key not in known}


def _is_another_rank() -> bool:
    """Whether this is one of many ranks, and not the first."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_rank() != 0


def _require_readable(manifest: Manifest) -> None:
    """Raise rather than commit what no reader would take: the ranks' parts were checked one by one only."""
    try:
        decode_manifest(encode(manifest), manifest.key)
        unflatten(manifest.tree, lambda node, _: node, manifest.segment_bytes, describe=True)
    except CorruptError as error:
        raise InvalidInputError(
            f"step {manifest.step} of run {manifest.run!r} cannot be saved as it is: {error}. Nothing was committed. "
            "Nest the state less deeply, or shard tensors of fewer dimensions."
        ) from error
