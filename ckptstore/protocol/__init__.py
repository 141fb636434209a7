"""The decisions of saves, deletes and collections, apart from all I/O: what to read, reuse, write and delete, and when.

Generators yield operations and are sent their results; whoever drives them (performing.py, or a test that walks every
interleaving) decides how they are carried out. docs/explanation/protocol.md says why it is safe.
"""

from ckptstore.protocol.candidates import (
    UNREADABLE_LIST,
    Candidate,
    current,
    may_be_committed,
    read_candidate,
    read_condemned,
)
from ckptstore.protocol.collects import Collected, CollectRequest, collect
from ckptstore.protocol.compactions import CompactRequest, compact
from ckptstore.protocol.deletes import bury_all, delete
from ckptstore.protocol.joint import begin, conclude, hold_part
from ckptstore.protocol.operations import (
    Check,
    Clock,
    Close,
    Create,
    Delete,
    Get,
    List,
    Open,
    Operation,
    Pause,
    Put,
    Sync,
    Upload,
    Uploaded,
)
from ckptstore.protocol.repairs import Repaired, RepairRequest, repair
from ckptstore.protocol.saves import JointRequest, PartRequest, SaveRequest, hold, save

__all__ = [
    "UNREADABLE_LIST",
    "Candidate",
    "Check",
    "Clock",
    "Close",
    "CollectRequest",
    "Collected",
    "CompactRequest",
    "Create",
    "Delete",
    "Get",
    "JointRequest",
    "List",
    "Open",
    "Operation",
    "PartRequest",
    "Pause",
    "Put",
    "RepairRequest",
    "Repaired",
    "SaveRequest",
    "Sync",
    "Upload",
    "Uploaded",
    "begin",
    "bury_all",
    "collect",
    "compact",
    "conclude",
    "current",
    "delete",
    "hold",
    "hold_part",
    "may_be_committed",
    "read_candidate",
    "read_condemned",
    "repair",
    "save",
]
