"""Which checkpoint of which store a writer or a reader of torch.distributed.checkpoint is about."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ckptstore.errors import InvalidInputError
from ckptstore.format import Codec, check_run_name, check_step
from ckptstore.objects.base import Objects
from ckptstore.pipeline import worker_threads
from ckptstore.store import Store

CHECKPOINT_ID = re.compile(r"(?:(?P<run>[^@/]+)?@)?(?P<step>[0-9]+)")


def is_checkpoint_id(checkpoint_id: "str | os.PathLike[str]") -> bool:
    """Whether it is RUN@STEP, or a step."""
    return CHECKPOINT_ID.fullmatch(os.fspath(checkpoint_id)) is not None


class Place:
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
        match = CHECKPOINT_ID.fullmatch(os.fspath(checkpoint_id))
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
