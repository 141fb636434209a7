"""What a file of another program holds, in the terms of this store."""

from dataclasses import dataclass
from typing import Any

from ckptstore.tree import TensorLeaf

__all__ = ["Portable"]


@dataclass(slots=True)
class Portable:
    """What was read from a file.

    Attributes:
        tree: the skeleton; the nodes of its tensors are those of `leaves`, to be filled in by whoever stores it.
        leaves: its tensors.
        metrics: the skeleton of the metrics; None if the file has none.
        metadata: the skeleton of the metadata; likewise.
        step: the step that it was exported from; None if the file does not tell.
    """

    tree: Any
    leaves: list[TensorLeaf]
    metrics: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    step: int | None = None
