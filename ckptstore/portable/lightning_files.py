"""What a checkpoint of PyTorch Lightning tells of itself, without the package `lightning`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["MAX_RUN_NAME", "is_lightning", "metadata_of", "metrics_of", "side_run", "step_of"]

VERSION_KEY = "pytorch-lightning_version"
MAX_RUN_NAME = 100
"""Names of runs that are made from it have to fit into the 128 characters that a name may have."""


def is_lightning(state: Any) -> bool:
    """Whether a Trainer of Lightning's saved it."""
    return isinstance(state, dict) and VERSION_KEY in state


def step_of(checkpoint: Mapping[str, Any]) -> int | None:
    """Of a Trainer's checkpoint, or a Fabric's that says so; None of what has no step, such as weights alone."""
    for key in ("global_step", "step"):
        step = checkpoint.get(key)
        if type(step) is int and step >= 0:
            return step
    return None


def metrics_of(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """What callbacks such as ModelCheckpoint monitor, as it is now."""
    callbacks = checkpoint.get("callbacks")
    metrics = {}
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("monitor"), str):
            score = state.get("current_score")
            if isinstance(score, torch.Tensor) and score.numel() == 1:
                metrics[state["monitor"]] = float(score)
    return metrics


def metadata_of(checkpoint: Mapping[str, Any], run: str, path: str) -> dict[str, Any]:
    """The metadata of a checkpoint that `CkptstoreIO` saves, by which it finds it again.

    Args:
        checkpoint: what Lightning saves.
        run: the run that the `CkptstoreIO` was given, also where the checkpoint goes to a run of its own.
        path: the path that stands for the checkpoint, absolute.
    """
    # Not the weights alone, which `save_weights_only=True` saves.
    is_resumable = step_of(checkpoint) is not None and (
        "state_dict" not in checkpoint or "optimizer_states" in checkpoint
    )
    return {"lightning": {"run": run, "path": path, "resumable": is_resumable}}


def side_run(run: str, path: str) -> str:
    """The run of a further file of a step that `run` has already: named by the file, as far as a name may be."""
    part = re.sub(r"[^A-Za-z0-9._+=,-]", "_", Path(path).stem) or "_"
    return f"{run}.{part}"[: MAX_RUN_NAME + 20]
