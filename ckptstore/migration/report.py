"""What an import did, source by source, and what it cost: values without behaviour."""

from dataclasses import dataclass, field
from typing import Literal

from ckptstore.errors import CheckpointError

__all__ = ["ImportReport", "ImportedCheckpoint"]

Outcome = Literal["imported", "there", "failed", "planned"]


@dataclass(frozen=True, slots=True)
class ImportedCheckpoint:
    """One source of an import.

    Attributes:
        source: its name in the folder.
        run: the run that it belongs to.
        step: its step; None if it could not be read, and its name does not tell.
        outcome: "imported"; "there", as it was already; "failed"; or "planned", by a dry run.
        source_bytes: the size of its files.
        failure: why it failed; else None.
        raw_bytes: the size of its tensors in memory; 0 if it failed or is planned, as all that follow.
        stored_bytes: the size of the chunks that hold it.
        new_bytes: of those, what was not in the store before it came.
        chunks: how many they are.
        reused_chunks: how many of those were in the store before.
    """

    source: str
    run: str
    step: int | None
    outcome: Outcome
    source_bytes: int = 0
    failure: CheckpointError | None = None
    raw_bytes: int = 0
    stored_bytes: int = 0
    new_bytes: int = 0
    chunks: int = 0
    reused_chunks: int = 0

    @property
    def error(self) -> str:
        """Why it failed, as text; else empty."""
        return str(self.failure or "")


@dataclass(slots=True)
class ImportReport:
    """What an import did, or would do.

    Attributes:
        source: the folder or file.
        run: the run.
        dry_run: whether nothing was changed.
        checkpoints: each source in the order of the steps, those that could not even be put in order last.
        passed_over: what is no checkpoint, or was excluded: each name with the reason.
    """

    source: str
    run: str
    dry_run: bool
    checkpoints: list[ImportedCheckpoint] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[ImportedCheckpoint]:
        """Those that are not in the store now, and should be."""
        return [each for each in self.checkpoints if each.outcome == "failed"]

    @property
    def source_bytes(self) -> int:
        """The size of the files of all that are in the store now."""
        return sum(each.source_bytes for each in self.checkpoints if each.outcome in ("imported", "there"))

    @property
    def raw_bytes(self) -> int:
        """The size of their tensors in memory, each for itself."""
        return sum(each.raw_bytes for each in self.checkpoints)

    @property
    def new_bytes(self) -> int:
        """What the store has grown by for them, in this import and in those that it goes on from."""
        return sum(each.new_bytes for each in self.checkpoints)

    @property
    def chunks(self) -> int:
        """The chunks of all of them, each as often as it is needed."""
        return sum(each.chunks for each in self.checkpoints)

    @property
    def reused_chunks(self) -> int:
        """How many of those were in the store already when their checkpoint came."""
        return sum(each.reused_chunks for each in self.checkpoints)
