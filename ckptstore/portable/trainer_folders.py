"""What a checkpoint folder of Hugging Face's `Trainer` tells of itself, without the package `transformers`."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["TRAINER_STATE", "metadata_of", "metrics_of", "read_state"]

TRAINER_STATE = "trainer_state.json"
"""The file in which a trainer keeps where it is."""


def metrics_of(log_history: Iterable[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What was logged at a step, without what only tells how fast it went."""
    metrics: dict[str, float] = {}
    for entry in log_history:
        if entry.get("step") == step:
            metrics |= {
                name: float(value)
                for name, value in entry.items()
                if isinstance(value, int | float)
                and name not in ("step", "epoch")
                and not re.search(r"_runtime$|_per_second$", name)
            }
    return metrics


def metadata_of(epoch: float | None) -> dict[str, Any]:
    """The metadata of a checkpoint that `CkptstoreCallback` saves."""
    return {"transformers": {"epoch": epoch}}


def read_state(content: bytes) -> tuple[int, list[dict[str, Any]], float | None]:
    """Step, log and epoch out of TRAINER_STATE. Raises ValueError if it makes no sense."""
    try:
        state = json.loads(content)
        step, log, epoch = state["global_step"], state.get("log_history", []), state.get("epoch")
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("it is not what a Trainer writes") from error
    if type(step) is not int or not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError("it is not what a Trainer writes")
    return step, log, epoch if isinstance(epoch, int | float) else None
