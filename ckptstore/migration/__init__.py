"""Checkpoints of other programs, a folder of them at a time, as the steps of a run. docs/how-to/migrate.md shows it.

`import_checkpoints` is what users call, and `ckptstore import` is the same on the command line. Each file here is one
question: steps (which step does a name mean), sources (what is a checkpoint), planning (in which order), identity (is
it there already), reading (what is in it), importing (all of it together).
"""

from ckptstore.migration.importing import import_checkpoints
from ckptstore.migration.report import ImportedCheckpoint, ImportReport

__all__ = ["ImportReport", "ImportedCheckpoint", "import_checkpoints"]
