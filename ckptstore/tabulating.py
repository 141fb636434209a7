"""The checkpoints of a run as a table of pandas, which is imported here and nowhere else."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas

__all__ = ["dataframe"]

_OWN = ("created", "raw_bytes", "stored_bytes", "new_bytes")


def dataframe(checkpoints: Sequence[Checkpoint]) -> "pandas.DataFrame":
    """See `ckptstore.Run.to_dataframe`."""
    try:
        import pandas
    except ImportError as error:
        raise InvalidInputError("tables need a package that is not installed: pip install pandas") from error
    names = list(dict.fromkeys(name for each in checkpoints for name in each.metrics))
    columns = {
        "created": [each.created for each in checkpoints],
        **{
            f"metrics.{name}" if name in _OWN else name: [each.metrics.get(name) for each in checkpoints]
            for name in names
        },
        **{name: [getattr(each, name) for each in checkpoints] for name in _OWN[1:]},
    }
    return pandas.DataFrame(columns, index=pandas.Index([each.step for each in checkpoints], name="step"))
