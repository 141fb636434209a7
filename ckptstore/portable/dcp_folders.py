"""Folders of `torch.distributed.checkpoint` as states, and states as such folders, in one process without a group.

torch unpickles their description and their values as they are, which runs whatever code they bring along. Here
dcp_metadata.py reads the one, and `weights_only=True` the others.
"""

import contextlib
import io
import secrets
import shutil
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from ckptstore.errors import InvalidInputError
from ckptstore.portable import torch_files
from ckptstore.portable.dcp_metadata import METADATA, read_metadata
from ckptstore.whole_files import explained, place_folder

__all__ = ["METADATA", "read_dcp_folder", "write_dcp_folder"]


def read_dcp_folder(folder: Path, *, trust: bool = False, keys: Collection[str] | None = None) -> dict[str, Any]:
    """The state that was saved, as nested as it was, all of it in memory; keys of dicts are texts, as torch makes them.

    Args:
        folder: the folder.
        trust: unpickle what it holds as torch does, which runs any code that it brings along.
        keys: read only what stands under these keys at the top.

    Raises:
        NotFoundError: there is no such folder, or it has no description.
        InvalidInputError: it is damaged, or holds what only code could make.
        UnavailableError: it cannot be read.
    """
    state: dict[str, Any] = {}
    with explained("read", folder / METADATA):
        if trust:
            (folder / METADATA).open("rb").close()
        else:
            try:
                read_metadata(folder)  # once before torch does, which prints what it catches and tells something else
            except InvalidInputError as error:
                text = str(error).removeprefix(f"{folder}: ")
                raise InvalidInputError(f"{folder}: {text}") from error
    reader = FileSystemReader(folder) if trust else _SafeReader(folder)
    planner_type: Any = _TrustingPlanner if trust else _SafePlanner
    planner = planner_type(None if keys is None else set(keys))
    try:
        with _quietly():
            _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch raises what it likes, in an exception that is none
        _raise_interrupt(error)
        refusal = next((inner for inner in _within(error) if isinstance(inner, InvalidInputError)), None)
        reason = str(refusal).removeprefix(f"{folder}: ") if refusal else f"it cannot be read: {_reason(error)}."
        raise InvalidInputError(f"{folder}: {reason}") from error
    return state


def write_dcp_folder(state: Any, folder: Path, *, overwrite: bool = False) -> None:
    """Write a state to a folder that appears whole or not at all.

    Raises:
        InvalidInputError: the state is no dict with texts as keys, which is all that torch's planner takes.
        ConflictError: the folder is there, and `overwrite` is False.
        UnavailableError: it cannot be written.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InvalidInputError(
            "torch.distributed.checkpoint takes a dict whose keys are texts, and this checkpoint is none: export it "
            "to a .pt file."
        )
    with explained("write", folder):
        new = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        try:
            try:
                with _quietly():
                    save(state, storage_writer=FileSystemWriter(new), no_dist=True)
            except CheckpointException as error:
                _raise_interrupt(error)
                cause = next((inner for inner in _within(error) if isinstance(inner, OSError)), None)
                raise cause or InvalidInputError(f"torch cannot write {folder}: {_reason(error)}.") from error
            place_folder(new, folder, overwrite=overwrite)
        finally:
            shutil.rmtree(new, ignore_errors=True)


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TrustingPlanner(_EmptyStateDictLoadPlanner):
    """Takes keys at the top of the tree alone, and descriptions without a tree as well."""

    def _should_include_key(self, key: str, metadata: Metadata) -> bool:
        return self.keys is None or key in self.keys


class _SafePlanner(_TrustingPlanner):
    """Makes values out of plain pickles alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        loaded = torch_files.read_stream(value, f"its value {key!r}")
        inner: Any = self.original_state_dict
        *above, last = self.mappings[key]
        for part in above:
            inner = inner[part]
        inner[last] = loaded


def _within(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from; torch hands over those of its ranks beside it."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for failure, _ in error.failures.values():
                yield from _within(failure)
        error = error.__cause__


def _raise_interrupt(error: BaseException) -> None:
    """Let go of what torch has caught and is nobody's error: Ctrl-C, say."""
    for inner in _within(error):
        if not isinstance(inner, Exception | CheckpointException):
            raise inner


def _reason(error: BaseException) -> str:
    """The innermost error in one line."""
    *_, last = _within(error)
    text = next((line.strip().rstrip(".") for line in str(last).splitlines() if line.strip()), "")
    return f"{type(last).__name__}{f': {text}' if text else ''}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's word on there being no process group, which is what we want."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
