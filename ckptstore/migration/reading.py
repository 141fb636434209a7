"""The content of a source, ready to be saved: a state, and what it tells of its step, its metrics and its framework."""

import copy
import fnmatch
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptstore.errors import CheckpointError, InvalidInputError, retold
from ckptstore.migration.sources import Source
from ckptstore.portable import Portable, folders, lightning_files, safetensors_files, torch_files, trainer_folders
from ckptstore.portable.dcp_folders import read_dcp_folder
from ckptstore.whole_files import explained

__all__ = ["STEP_KEYS", "Content", "explained_leaf", "read", "step_inside", "without"]

STEP_KEYS = ("global_step", "step", "iteration", "iter", "num_updates", "update")
"""Where trainings keep their step, in the order in which they are looked for."""


@dataclass(slots=True)
class Content:
    """What a source holds.

    Attributes:
        state: the state, of all but safetensors files.
        portable: of a safetensors file.
        step: the step that it tells; None if it tells none.
        metrics: as a framework's integration would have saved them.
        metadata: likewise.
        is_lightning: whether Lightning's Trainer saved it.
    """

    state: Any = None
    portable: Portable | None = None
    step: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    is_lightning: bool = False


def read(source: Source, *, trust: bool = False, leave_out: Sequence[str] = ()) -> Content:
    """Read a source; the tensors of its files are mapped into memory, and read when they are needed.

    Raises:
        NotFoundError, UnavailableError: it cannot be read.
        InvalidInputError: it is damaged, or takes code to be read; the text says what to do.
    """
    if source.kind == "folder":
        return _read_folder(source.path)
    if source.kind == "dcp":
        state: Any = read_dcp_folder(source.path, trust=trust)
    else:
        with explained("read", source.path), source.path.open("rb"):
            pass
        if source.path.suffix == ".safetensors":
            portable = safetensors_files.read(source.path)
            return Content(portable=portable, step=portable.step)
        state = torch_files.read(source.path, mapped=True, trust=trust)
    state = without(state, leave_out)
    content = Content(state=state, step=_step_in(state))
    if lightning_files.is_lightning(state):
        content.is_lightning = True
        content.metrics = lightning_files.metrics_of(state)
    return content


def step_inside(source: Source, *, trust: bool = False) -> int | None:
    """The step that a source tells, with as little reading as that takes. Raises as `read` does."""
    if source.kind == "dcp":
        return _step_in(read_dcp_folder(source.path, trust=trust, keys=STEP_KEYS))
    if source.kind == "folder":
        return _trainer_state(source.path)[0]
    return read(source, trust=trust).step


def without(state: Any, patterns: Sequence[str]) -> Any:
    """A state less what `patterns` name: paths such as `args` or `optimizer.*`, of keys joined by dots."""
    return _without(state, patterns, "") if patterns else state


def _without(node: Any, patterns: Sequence[str], above: str) -> Any:
    if not isinstance(node, dict):
        return node
    changed: Any = None
    for key, below in node.items():
        path = f"{above}{key}"
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            # The same type, with what torch hangs on dicts of modules.
            changed = copy.copy(node) if changed is None else changed
            del changed[key]
            continue
        kept = _without(below, patterns, f"{path}.")
        if kept is not below:
            changed = copy.copy(node) if changed is None else changed
            changed[key] = kept
    return node if changed is None else changed


def _read_folder(folder: Path) -> Content:
    step, metrics, metadata = _trainer_state(folder)
    files = folders.read_folder(folder, mapped=True)
    damaged = [name for name, held in files.items() if name.endswith(".safetensors") and isinstance(held, bytes)]
    if damaged:
        raise InvalidInputError(
            f"{folder / damaged[0]} is damaged: its header does not describe the bytes that it has. Take another copy "
            "of it."
        )
    return Content(state=files, step=step, metrics=metrics, metadata=metadata)


def _trainer_state(folder: Path) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
    """Step, metrics and metadata as CkptstoreCallback saves them; of another folder, none."""
    file = folder / trainer_folders.TRAINER_STATE
    with explained("read", file):
        if not file.is_file():
            return None, {}, {}
        content = file.read_bytes()
    try:
        step, log, epoch = trainer_folders.read_state(content)
    except ValueError as error:
        raise InvalidInputError(f"{file} is damaged: {error}. Take another copy of it.") from error
    return step, dict(trainer_folders.metrics_of(log, step)), trainer_folders.metadata_of(epoch)


def _step_in(state: Any) -> int | None:
    if not isinstance(state, dict):
        return None
    for key in STEP_KEYS:
        value = state.get(key)
        if value is None or isinstance(value, bool | str | bytes):
            continue
        try:
            step = operator.index(value)  # of NumPy's numbers and of tensors with one element, too
        except (TypeError, ValueError, RuntimeError):
            continue
        if step >= 0:
            return step
    return None


def explained_leaf(error: InvalidInputError, source: Source) -> CheckpointError:
    """What a save says of a leaf that cannot be stored, with the way out that an import has."""
    return retold(error, f"{source.path}: {error} Or leave it out: --leave-out PATH (leave_out= in Python).")
