"""A checkpoint store for people who train models: incremental, verified, shared saves to a bucket or a disk.

    run = ckptstore.Store("s3://bucket/ckpts").run("lstm")
    checkpoint = run.restore({"model": model, "optimizer": optimizer})
    run.save({"model": model, "optimizer": optimizer, "step": step}, step=step)

Importing this package is cheap: torch is imported when a state is first saved or restored.
"""

from typing import TYPE_CHECKING, Any

from ckptstore._version import __version__
from ckptstore.background import PendingSave
from ckptstore.checkpoint import Checkpoint, TensorInfo
from ckptstore.errors import (
    CheckpointError,
    CheckpointWarning,
    ConflictError,
    CorruptError,
    FencedError,
    InvalidInputError,
    MissingChunkError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
)
from ckptstore.run import Run
from ckptstore.store import Store

if TYPE_CHECKING:
    from ckptstore.rng import RngState
    from ckptstore.tree import register

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "ConflictError",
    "CorruptError",
    "FencedError",
    "InvalidInputError",
    "MissingChunkError",
    "NotFoundError",
    "PendingSave",
    "RngState",
    "Run",
    "Store",
    "TensorInfo",
    "UnavailableError",
    "UnsupportedFormatError",
    "__version__",
    "register",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name == "RngState":
        from ckptstore.rng import RngState

        return RngState
    if name == "register":
        from ckptstore.tree import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
