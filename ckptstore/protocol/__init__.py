"""The decisions of saves and deletes, apart from all I/O: what to read, what to reuse, what to write, when it counts.

Generators yield operations and are sent their results; whoever drives them (performing.py, or a test that walks every
interleaving) decides how they are carried out. docs/explanation/protocol.md says why it is safe.
"""

from ckptstore.protocol.candidates import Candidate, current, may_be_committed, read_candidate
from ckptstore.protocol.deletes import delete
from ckptstore.protocol.operations import (
    Close,
    Create,
    Get,
    List,
    Open,
    Operation,
    Put,
    Sync,
    Upload,
    Uploaded,
)
from ckptstore.protocol.saves import SaveRequest, save

__all__ = [
    "Candidate",
    "Close",
    "Create",
    "Get",
    "List",
    "Open",
    "Operation",
    "Put",
    "SaveRequest",
    "Sync",
    "Upload",
    "Uploaded",
    "current",
    "delete",
    "may_be_committed",
    "read_candidate",
    "save",
]
