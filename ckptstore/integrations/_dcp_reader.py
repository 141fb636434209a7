"""The storage reader: which checkpoint, and how each rank gets what it asks for. See dcp.py."""

import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptstore import blocks as boxes
from ckptstore import catalog, restoring
from ckptstore.assembly import Assembly
from ckptstore.checkpoint import Checkpoint
from ckptstore.condemning import condemn_corrupt, marked_corrupt
from ckptstore.errors import CheckpointError, CheckpointWarning, CorruptError, InvalidInputError, retold
from ckptstore.format import MAX_BLOCK_DIMENSIONS
from ckptstore.integrations._dcp_keys import Keys
from ckptstore.integrations._dcp_place import Place, is_checkpoint_id
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.pipeline import MAX_INFLIGHT_BYTES
from ckptstore.skeleton import TensorNode, tensors
from ckptstore.store import Store
from ckptstore.tree import TORCH_DTYPES, unflatten


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
        self._place = Place(store, run, step, storage_options, "fast", threads)
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
        return is_checkpoint_id(checkpoint_id)

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
        _, keys = self._opened()
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        batch, held = _Batch(values), 0
        for item in (item for item in plan.items if item.type != LoadItemType.BYTE_IO):
            target = planner.resolve_tensor(item).detach()
            batch.tensors.append((item, target))
            node = keys.tensor(item.storage_index.fqn)
            if node is not None and not _is_direct(target, node):
                held += target.numel() * node.item_bytes  # on its way to another device, or dtype
            if held >= MAX_INFLIGHT_BYTES:
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
            if memory.numel() and not (
                memory.dim() < MAX_BLOCK_DIMENSIONS
                and assembly.want_box(node, box, memory.unsqueeze(-1).view(torch.uint8).numpy())
            ):
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
