"""The checkpoint folders of Hugging Face's `Trainer` in a store: a callback that saves each, and writes them back.

The trainer goes on writing `checkpoint-500` and the like to its disk; the store holds each of them as the step 500 of a
run, with the tensors in its files as tensors. Why: docs/decisions/0017-framework-integrations.md.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ckptstore import PendingSave, Run
from ckptstore.errors import CheckpointWarning, ConflictError, CorruptError, InvalidInputError, NotFoundError
from ckptstore.portable import read_folder, trainer_folders, write_folder
from ckptstore.portable.trainer_folders import TRAINER_STATE

__all__ = ["CkptstoreCallback"]


class CkptstoreCallback(TrainerCallback):
    """Saves each checkpoint folder of a Hugging Face `Trainer`, and writes it back on an empty machine.

        callback = CkptstoreCallback(Store("s3://bucket/ckpts").run("gpt2-bible"))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.restore(args))

    Step 500 of the run is the folder `checkpoint-500`: its files by name, in `model.safetensors` and `optimizer.pt`
    each tensor for itself, so what is equal in two checkpoints is stored once. `save_total_limit` is for the folders on
    the disk; in the store, `Store.prune` keeps what you want kept.
    """

    def __init__(self, run: Run, *, background: bool = False) -> None:
        """Touches nothing yet.

        Args:
            run: where to save. One training, one run.
            background: let a thread write to the store while the training goes on. A failure is raised at the next
                checkpoint, or at the end of the training.
        """
        self._run = run
        self._background = background
        self._pending: PendingSave | None = None
        self._goes_on = False
        """Whether this training is the one whose checkpoints are in the run."""

    def restore(self, args: TrainingArguments | str | os.PathLike[str], *, step: int | None = None) -> str | None:
        """Write the newest checkpoint that verifies to the output folder, for `train(resume_from_checkpoint=…)`.

        A folder of that name is replaced. If the best checkpoint (`load_best_model_at_end`) is another one, it is
        written too. With several processes, call it in all of them: the first one of each machine writes.

        Args:
            args: the arguments of the trainer, or its output folder.
            step: write this step, and raise if it is damaged.

        Returns:
            The folder, such as `out/checkpoint-500`; None if the run has no checkpoint: a first start.

        Raises:
            CorruptError: no checkpoint verifies, or that of `step` does not.
            NotFoundError: there is no checkpoint at `step`.
            UnavailableError: the store cannot be read, or the folder cannot be written.
        """
        output = Path(args if isinstance(args, str | os.PathLike) else str(args.output_dir))
        found = self._first_writes(output, step)
        if found is None:
            return None
        self._goes_on = True
        return str(output / f"{PREFIX_CHECKPOINT_DIR}-{found}")

    # ---- what the trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Keep a training that was started anew by mistake from mixing with an older one."""
        if state.global_step:
            self._goes_on = True
        elif state.is_world_process_zero and not self._goes_on and (steps := self._run.steps()):
            raise ConflictError(
                f"{self._run!r} has checkpoints of another training, up to step {steps[-1]}, and this one begins at "
                "step 0. Resume with train(resume_from_checkpoint=callback.restore(args)), or choose another run."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Save the folder that the trainer has just written.

        Raises:
            InvalidInputError: it is a search for hyper-parameters, whose trainings share their steps.
            CheckpointError: as `Run.save` does; or the save in the background before this one failed.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its generators' states into the folder
        if not state.is_world_process_zero:
            return
        if state.is_hyper_param_search:
            raise InvalidInputError("a search for hyper-parameters is many trainings: give each a run of its own.")
        self._settle()
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        files = read_folder(folder)
        _warn_of_missing_ranks(files, args.world_size)
        save = self._run.save_async if self._background else self._run.save
        saved = save(
            files,
            step=state.global_step,
            metrics=trainer_folders.metrics_of(state.log_history, state.global_step),
            metadata=trainer_folders.metadata_of(state.epoch),
            replace=self._goes_on,
        )
        self._goes_on = True
        if isinstance(saved, PendingSave):
            self._pending = saved

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Wait for the save in the background; raise what it failed with."""
        self._settle()

    # ---- how

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _first_writes(self, output: Path, step: int | None) -> int | None:
        """Let the first process find the step and write it, then the first of each other machine; all return it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._write_newest(output, step)
        found: list[Any] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                found = [self._write_newest(output, step)]
            except Exception as error:
                found = [error]  # handed over: the others wait for an answer
        torch.distributed.broadcast_object_list(found)
        newest: int | Exception | None = found[0]
        if isinstance(newest, Exception):
            raise newest
        if newest is not None and torch.distributed.get_rank() and os.environ.get("LOCAL_RANK") == "0":
            self._write(output, newest)
        torch.distributed.barrier()
        return newest

    def _write_newest(self, output: Path, step: int | None) -> int | None:
        steps = self._run.steps()[::-1] if step is None else [step]
        damage: CorruptError | None = None
        for candidate in steps:
            if damage is not None:
                warnings.warn(CheckpointWarning(f"damaged: {damage} Going back to step {candidate}."), stacklevel=4)
            try:
                self._write(output, candidate)
            except CorruptError as error:
                damage = error
                continue
            return candidate
        if damage is not None:
            raise damage
        return None

    def _write(self, output: Path, step: int) -> None:
        files = self._run.load(step)
        if not isinstance(files, dict) or TRAINER_STATE not in files:
            raise InvalidInputError(
                f"step {step} of {self._run!r} is no checkpoint of a Trainer: it lacks {TRAINER_STATE}."
            )
        best = _best_step(files[TRAINER_STATE])
        # First, as the trainer takes the folder that was written last for the newest.
        if best not in (None, step) and not (output / f"{PREFIX_CHECKPOINT_DIR}-{best}").exists():
            self._write_best(output, best)
        write_folder(files, output / f"{PREFIX_CHECKPOINT_DIR}-{step}")

    def _write_best(self, output: Path, step: int) -> None:
        try:
            write_folder(self._run.load(step), output / f"{PREFIX_CHECKPOINT_DIR}-{step}")
        except (CorruptError, NotFoundError) as error:
            warnings.warn(
                CheckpointWarning(f"the best checkpoint so far cannot be written back: {error}"), stacklevel=6
            )


def _best_step(trainer_state: bytes) -> int | None:
    """The step of the best checkpoint so far, as the trainer's state tells it."""
    best = json.loads(trainer_state).get("best_model_checkpoint")
    number = re.search(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)$", best or "")
    return int(number[1]) if number else None


def _warn_of_missing_ranks(files: dict[str, Any], world_size: int) -> None:
    """Processes on other machines write their generators' states to disks that this one does not see."""
    states = [name for name in files if re.fullmatch(r"rng_state(_\d+)?\.pth", name)]
    if states and len(states) < world_size:
        warnings.warn(
            CheckpointWarning(
                f"of {world_size} processes only {len(states)} have saved their generators of random numbers where "
                "this one sees it, so a resumed training draws other numbers. Use an output folder that all share."
            ),
            stacklevel=3,
        )
