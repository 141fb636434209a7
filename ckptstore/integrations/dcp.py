"""torch.distributed.checkpoint on a ckptstore store: `dcp.save`, `dcp.async_save` and `dcp.load`, with any planner.

    dcp.save(state_dict, storage_writer=CkptstoreWriter("s3://bucket/ckpts", run="llama", step=100))
    dcp.load(state_dict, storage_reader=CkptstoreReader("s3://bucket/ckpts", run="llama"))

What is saved is an ordinary checkpoint: a tensor whose shards lie on many ranks is one tensor of its full shape.
docs/decisions/0016-dcp.md says how.
"""

import io
import os
import re
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ckptstore import blocks as boxes
from ckptstore import catalog, protocol, restoring, saving, tagging
from ckptstore.assembly import Assembly
from ckptstore.checkpoint import Checkpoint
from ckptstore.condemning import condemn_corrupt, marked_corrupt
from ckptstore.errors import CheckpointError, CheckpointWarning, CorruptError, InvalidInputError, retold
from ckptstore.format import Codec, check_run_name, check_step, check_tag, new_joint_save_id, part_id
from ckptstore.integrations._dcp_keys import Keys
from ckptstore.manifest import Manifest, Marker, content_digest
from ckptstore.objects.base import Objects
from ckptstore.performing import Performer
from ckptstore.pipeline import MAX_INFLIGHT_BYTES, Progress, beside, worker_threads
from ckptstore.shards import MAX_CARRIED_BYTES, Part, Shard, Terms, Tree, Value, Whole
from ckptstore.skeleton import TensorNode, tensors
from ckptstore.store import Store
from ckptstore.tree import TORCH_DTYPES, unflatten
from ckptstore.writer import now_text, this_writer

__all__ = ["CkptstoreReader", "CkptstoreWriter"]

_CHECKPOINT_ID = re.compile(r"(?:(?P<run>[^@/]+)?@)?(?P<step>[0-9]+)")


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


class _Place:
    """Which checkpoint of which store is meant; the same for writer and reader."""

    def __init__(
        self,
        store: "str | os.PathLike[str] | Store",
        run: str | None,
        step: int | None,
        storage_options: Mapping[str, Any] | None,
        codec: Codec,
        threads: int | None,
    ) -> None:
        if isinstance(store, Store) and storage_options is not None:
            raise InvalidInputError("storage_options belong to the Store, which has been made already.")
        self.run = None if run is None else check_run_name(run)
        self.step = None if step is None else check_step(step)
        self._given = store
        self._made_of = (storage_options, codec, threads)
        self._store: Store | None = self._open()  # raises what is wrong with it now, and not in the middle of a save

    def _open(self) -> Store:
        options, codec, threads = self._made_of
        given = self._given
        return given if isinstance(given, Store) else Store(given, options, codec=codec, threads=threads)

    @property
    def store(self) -> Store:
        if self._store is None:  # in another process than the one that it was made in
            self._store = self._open()
        return self._store

    @property
    def objects(self) -> Objects:
        return self.store._objects

    @property
    def threads(self) -> int:
        """For each rank of a machine a share of its cores, where torchrun says how many ranks there are."""
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
        return self.store._threads or max(
            1, worker_threads() // (int(ranks) if ranks.isdecimal() and int(ranks) else 1)
        )

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._given, Store):
            raise InvalidInputError(
                "a Store cannot be sent to another process, such as that of async_save with "
                "AsyncCheckpointerType.PROCESS: give its URL and storage_options in its place."
            )
        return {**self.__dict__, "_store": None}

    def go_to(self, checkpoint_id: "str | os.PathLike[str]") -> None:
        """Take over what a `checkpoint_id` says."""
        match = _CHECKPOINT_ID.fullmatch(os.fspath(checkpoint_id))
        if match is None:
            raise InvalidInputError(
                f"checkpoint_id {os.fspath(checkpoint_id)!r} is neither RUN@STEP, such as 'llama@100', nor a "
                "step, such as '100'. The store is given to CkptstoreWriter and CkptstoreReader."
            )
        self.step = check_step(int(match["step"]))
        self.run = check_run_name(match["run"]) if match["run"] else self.run

    @property
    def text(self) -> str:
        return f"{self.run}@{'latest' if self.step is None else self.step}"

    def require_run(self) -> str:
        if self.run is None:
            raise InvalidInputError(f"no run is given: pass run='name', or checkpoint_id='name@{self.step or 100}'.")
        return self.run


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
        self._place = _Place(store, run, step, storage_options, codec, threads)
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
        return _CHECKPOINT_ID.fullmatch(os.fspath(checkpoint_id)) is not None

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
        session = self._session
        if session is None:
            raise InvalidInputError("there is no save to finish: dcp.save and dcp.async_save call this.")
        try:
            manifest = self._conclude(session, metadata, results)
        finally:
            self._abandon()
        self._checkpoint = Checkpoint(manifest)
        metadata.storage_meta = self.storage_meta()
        for tag in self._tags:
            tagging.add(self._place.objects, manifest.run, manifest.step, tag)

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
        return session.performer.perform(protocol.conclude(request, held))

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


class CkptstoreReader(StorageReader):
    """Where `dcp.load` takes a checkpoint from: a step of a run of a ckptstore store, whatever saved it.

    Each rank reads only chunks that hold a part of what it asks for, and every byte is compared with its digest before
    it is handed out. How many ranks there were when it was saved, and how tensors were sharded, does not matter.

    Args:
        store: a path or URL, as for `ckptstore.Store`; or a `Store`.
        run: the name of the run.
        step: the step. None: the newest checkpoint that is not known to be damaged.
        storage_options: as for `Store`.
        threads: how many decode on each rank. None: the cores of the machine, divided by the ranks on it.

    Raises:
        InvalidInputError: an argument makes no sense.
    """

    def __init__(
        self,
        store: "str | os.PathLike[str] | Store",
        *,
        run: str | None = None,
        step: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._place = _Place(store, run, step, storage_options, "fast", threads)
        self._manifest: Manifest | None = None
        self._keys: Keys | None = None
        self._failure: CheckpointError | None = None

    def __repr__(self) -> str:
        return f"CkptstoreReader({self._place.store.url!r}, {self._place.text})"

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that is, or was, loaded. Raises what `Run.checkpoint` raises."""
        return Checkpoint(self._manifest or self._pick())

    @property
    def checkpoint_id(self) -> str:
        """RUN@STEP."""
        return self._place.text

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: "str | os.PathLike[str]") -> bool:
        """Whether it is RUN@STEP, or a step."""
        return _CHECKPOINT_ID.fullmatch(os.fspath(checkpoint_id)) is not None

    def reset(self, checkpoint_id: "str | os.PathLike[str] | None" = None) -> None:
        """Begin anew, with another checkpoint if `checkpoint_id` is given."""
        self._manifest = self._keys = None
        if checkpoint_id:
            self._place.go_to(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """All ranks: find the checkpoint, and describe it to the planner."""
        self._manifest = self._keys = self._failure = None
        try:
            self._manifest = self._pick()
            self._keys = Keys(self._manifest)
            metadata = self._keys.metadata()
        except CheckpointError as error:
            # DCP would log it, try again, and raise an AssertionError. It is raised in the step that comes next.
            self._failure = error
            return Metadata(state_dict_metadata={})
        metadata.storage_meta = StorageMeta(checkpoint_id=self.checkpoint_id, load_id=self._manifest.save)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks: raise what kept the metadata from being read."""
        if self._failure is not None:
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """All ranks: say which checkpoint was found."""
        found, _ = self._opened()
        return replace(plan, storage_data=(found.run, found.step, found.content))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator: see that all ranks have found the same."""
        found = {plan.storage_data for plan in plans}
        if len(found) > 1:
            steps = ", ".join(sorted(f"{run}@{step}" for run, step, _ in found))
            raise InvalidInputError(
                f"the ranks have found different newest checkpoints ({steps}): somebody is saving to the run. Give the "
                "step."
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """All ranks: fetch, verify, and fill."""
        self._opened()
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        batch, held = _Batch(values), 0
        for item in (item for item in plan.items if item.type != LoadItemType.BYTE_IO):
            target = planner.resolve_tensor(item).detach()
            batch.tensors.append((item, target))
            held += 0 if target.device.type == "cpu" else target.numel() * target.element_size()
            if held >= MAX_INFLIGHT_BYTES:  # what is on its way to another device
                self._read(batch, planner)
                batch, held = _Batch([]), 0
        self._read(batch, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, batch: "_Batch", planner: LoadPlanner) -> None:
        manifest, keys = self._opened()
        try:
            batch.fill(manifest, keys, self._place.objects, self._place.threads)
        except CorruptError as error:
            again = restoring.rewritten(self._place.objects, manifest, error)
            if again is None:
                condemn_corrupt(self._place.objects, error)
                raise retold(
                    error,
                    f"{error}. What was loaded so far must not be used. Load another step, or the newest one (no step "
                    "given): the one that is damaged is passed over then.",
                ) from error
            self._manifest = again
            self._read(batch, planner)
            return
        batch.hand_over(planner)

    def _opened(self) -> tuple[Manifest, Keys]:
        if self._manifest is None or self._keys is None:
            raise InvalidInputError("there is nothing to read yet: dcp.load calls this.")
        return self._manifest, self._keys

    def _pick(self) -> Manifest:
        objects, run, step = self._place.objects, self._place.require_run(), self._place.step
        if step is not None:
            return catalog.pick(objects, run, step)
        catalog.require_store(objects)
        damaged = marked_corrupt(objects)
        for found in catalog.newest_first(objects, run):
            if isinstance(found, Manifest) and damaged.isdisjoint(chunk.key for chunk in found.chunks):
                return found
            what = f"step {found.step} of run {run!r} has damaged chunks" if isinstance(found, Manifest) else str(found)
            warnings.warn(CheckpointWarning(f"{what}. Going back to an older checkpoint."), stacklevel=4)
        return catalog.newest_or_raise(objects, run)


class _Batch:
    """Items that are read together."""

    def __init__(self, values: list[ReadItem]) -> None:
        self._values = values
        self.tensors: list[tuple[ReadItem, torch.Tensor]] = []
        self._ready: list[torch.Tensor] = []
        self._made: list[Any] = []

    def fill(self, manifest: Manifest, keys: Keys, objects: Objects, threads: int) -> None:
        """Read everything. Raises CorruptError, UnavailableError."""
        assembly, lengths = Assembly(manifest), manifest.segment_bytes
        for item in self._values:
            for _, held in tensors(keys.node(item.storage_index.fqn), lengths, item.storage_index.fqn):
                assembly.want(held)
        wholes: list[tuple[int, TensorNode]] = []
        self._ready = []
        for number, (item, target) in enumerate(self.tensors):
            node = keys.tensor(item.storage_index.fqn)
            if node is None:
                raise InvalidInputError(f"{item.storage_index.fqn} is no tensor in the checkpoint.")
            memory = target if _is_direct(target, node) else torch.empty(item.lengths, dtype=TORCH_DTYPES[node.dtype])
            self._ready.append(memory)
            box: boxes.Box = tuple(item.storage_offsets), tuple(item.lengths)
            if memory.numel() and not assembly.want_box(node, box, memory.unsqueeze(-1).view(torch.uint8).numpy()):
                assembly.want(node)
                wholes.append((number, node))
        assembly.fill(objects, threads)
        for number, whole in wholes:
            item = self.tensors[number][0]
            box = tuple(item.storage_offsets), tuple(item.lengths)
            self._ready[number].copy_(assembly.value(whole).detach()[boxes.within(box, ((0,) * len(box[0]), box[1]))])
        self._made = [
            unflatten(
                keys.node(item.storage_index.fqn),
                lambda node, _: assembly.value(node),
                lengths,
                item.storage_index.fqn,
            )
            for item in self._values
        ]

    def hand_over(self, planner: LoadPlanner) -> None:
        """Let the planner have what was read."""
        for (item, target), ready in zip(self.tensors, self._ready, strict=True):
            if ready is not target:
                target.copy_(ready)
            planner.commit_tensor(item, target)
        for item, value in zip(self._values, self._made, strict=True):
            written = io.BytesIO()
            torch.save(value, written)  # planners take it from here by torch.load: of bytes made in this very process
            written.seek(0)
            planner.load_bytes(item, written)


def _is_direct(target: torch.Tensor, node: TensorNode) -> bool:
    """Whether bytes can be written into the tensor as they are."""
    return (
        target.device.type == "cpu"
        and target.layout is torch.strided
        and type(target) is torch.Tensor
        and target.dtype == TORCH_DTYPES[node.dtype]
        and not (target.is_conj() or target.is_neg())
        and not any(size > 1 and step == 0 for size, step in zip(target.shape, target.stride(), strict=True))
    )
