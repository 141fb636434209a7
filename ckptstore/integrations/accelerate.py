"""`Accelerator.save_state` and `load_state` of Hugging Face Accelerate, to a store and from it.

Accelerate writes a folder, and has hooks for the models in it alone, none for when it is complete. So these two let it
write the folder, store that with the tensors in its files as tensors, and the way back. Why:
docs/decisions/0017-framework-integrations.md.
"""

import contextlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ckptstore import Checkpoint, PendingSave, Run
from ckptstore.errors import CheckpointWarning, CorruptError, InvalidInputError
from ckptstore.portable import read_folder, write_folder

__all__ = ["load_state", "save_state", "save_state_async"]

T = TypeVar("T")


def save_state(
    accelerator: Accelerator,
    run: Run,
    *,
    step: int,
    metrics: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Checkpoint:
    """Save what `accelerator.save_state` saves: all that was prepared or registered, and the random generators.

    Call it in every process. The first one writes to the store, and all return when the checkpoint is durable.

    Args:
        accelerator: whose state.
        run: where to.
        step: the step to save it as.
        metrics: as for `Run.save`.
        metadata: likewise.
        replace: likewise.
        folder: where Accelerate may write meanwhile; all processes have to see it, so with several machines it lies on
            a disk that they share. None is a folder for temporary files.
        settings: for `Accelerator.save_state`, such as `safe_serialization`.

    Returns:
        The checkpoint, in every process.

    Raises:
        InvalidInputError: the processes do not all see `folder`.
        CheckpointError: as `Run.save` does, in every process.
    """
    with _written(accelerator, folder, settings) as place:
        saved = _first(
            accelerator,
            lambda: (
                run.save(_read(accelerator, place), step=step, metrics=metrics, metadata=metadata, replace=replace).step
            ),
        )
    return run.checkpoint(saved)


def save_state_async(
    accelerator: Accelerator,
    run: Run,
    *,
    step: int,
    metrics: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> PendingSave | None:
    """As `save_state`, but a thread of the first process writes to the store while the training goes on.

    What Accelerate writes to `folder` is waited for.

    Returns:
        In the first process the pending save, whose `result()` waits for it; None in the others.

    Raises:
        InvalidInputError: the processes do not all see `folder`.
        CheckpointError: as `Run.save_async` does, in every process.
    """
    pending: list[PendingSave] = []
    with _written(accelerator, folder, settings) as place:
        _first(
            accelerator,
            lambda: pending.append(
                run.save_async(
                    _read(accelerator, place), step=step, metrics=metrics, metadata=metadata, replace=replace
                )
            ),
        )
    return pending[0] if pending else None


def load_state(
    accelerator: Accelerator,
    run: Run,
    *,
    step: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Checkpoint | None:
    """Let `accelerator.load_state` load the newest checkpoint that verifies. Call it in every process.

    All of a checkpoint is verified before anything of it is loaded, so a damaged one changes nothing.

    Args:
        accelerator: what was prepared and registered with it is filled.
        run: where from.
        step: load this step, and raise if it is damaged.
        folder: as for `save_state`.
        settings: for `Accelerator.load_state`.

    Returns:
        The checkpoint, in every process; None if the run has none: a first start.

    Raises:
        CorruptError: no checkpoint verifies, or that of `step` does not.
        NotFoundError: there is no checkpoint at `step`.
        UnavailableError: the store cannot be reached or read; never taken for a first start.
    """
    with _shared(accelerator, folder) as place:
        found = _first(accelerator, lambda: _write_newest(run, step, place))
        if found is None:
            return None
        accelerator.load_state(str(place), **settings)
        accelerator.wait_for_everyone()
    return run.checkpoint(found)


@contextlib.contextmanager
def _written(
    accelerator: Accelerator, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> Iterator[Path]:
    """The folder that Accelerate has written, until it is stored."""
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise InvalidInputError(
            "automatic_checkpoint_naming makes Accelerate choose folders itself: leave it out, the run has the steps."
        )
    with _shared(accelerator, folder) as place:
        accelerator.save_state(str(place), **settings)
        accelerator.wait_for_everyone()
        yield place


@contextlib.contextmanager
def _shared(accelerator: Accelerator, folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A new folder, the same one in all processes, that is gone afterwards."""
    parent = None if folder is None else os.fspath(folder)

    def make() -> str:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="ckptstore-", dir=parent)

    place = Path(_first(accelerator, make))
    try:
        yield place
    finally:
        if accelerator.is_local_main_process:
            shutil.rmtree(place, ignore_errors=True)


def _first(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Let the first process act; all return what came of it, or raise its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except Exception as error:  # handed over: the others wait for an answer
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _read(accelerator: Accelerator, place: Path) -> dict[str, Any]:
    files = read_folder(place)
    seen = sum(re.fullmatch(r"random_states_\d+\.pkl", name) is not None for name in files)
    if seen != accelerator.num_processes:
        raise InvalidInputError(
            f"of {accelerator.num_processes} processes only {seen} have written to {place}: give folder=…, a folder "
            "that all machines share."
        )
    return files


def _write_newest(run: Run, step: int | None, place: Path) -> int | None:
    steps = run.steps()[::-1] if step is None else [step]
    damage: CorruptError | None = None
    for candidate in steps:
        if damage is not None:
            warnings.warn(CheckpointWarning(f"damaged: {damage} Going back to step {candidate}."), stacklevel=4)
        try:
            files = run.load(candidate)
        except CorruptError as error:
            damage = error
            continue
        if not isinstance(files, dict) or "random_states_0.pkl" not in files:
            raise InvalidInputError(f"step {candidate} of {run!r} is no state of an Accelerator.")
        write_folder(files, place)
        return candidate
    if damage is not None:
        raise damage
    return None
