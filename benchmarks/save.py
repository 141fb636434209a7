"""How long a durable save of a new state takes, compared with torch.save and fsync.

Each round saves the state after another training step, so that nothing of it is in the store yet.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

import ckptstore
from benchmarks.states import STEPS, Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Stopwatch, Took, compared, fresh, in_turn, target, use_kernels
from ckptstore.pipeline import worker_threads

QUESTION = "save: LSTM and Adam to local disk with fsync, all of it new"
TARGET = 0.8
BASE = "torch.save + fsync"
OURS = "ckptstore"
OURS_FAST = "ckptstore[fast]"
OURS_PLAIN = "ckptstore, codec none"
OURS_UNCHANGED = "ckptstore, unchanged"
DCP = "DCP FileSystemWriter, synced"
SAFETENSORS = "safetensors + fsync"


def ask(folder: Path, rounds: int) -> Report:
    """A durable save of a new state against torch.save and fsync, in one training that goes on between the rounds."""
    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    with work_folder(folder) as work:
        run = ckptstore.Store(work / "store").run("lstm")
        plain = ckptstore.Store(work / "plain", codec="none").run("lstm")
        repeated = ckptstore.Store(work / "repeated").run("lstm")

        def trained(number: int) -> None:
            training.train(
                batches, number + STEPS + 2 - training.step
            )  # a step further in each round, whoever is first

        def ours(number: int) -> Took:
            trained(number)
            return timed_save(run, training)

        def theirs(number: int) -> Took:
            trained(number)
            return timed_torch_save(work / f"{number}.pt", training)

        def uncompressed(number: int) -> Took:
            trained(number)
            return timed_save(plain, training)

        def unchanged(number: int) -> Took:
            """The state that was saved a moment ago, as another step."""
            trained(number)
            repeated.save(training.state(), step=2 * training.step)
            with Stopwatch() as watch:
                checkpoint = repeated.save(training.state(), step=2 * training.step + 1)
            assert checkpoint.new_bytes == 0
            return watch.took

        def dcp(number: int) -> Took:
            trained(number)
            return timed_dcp_save(work / f"dcp-{number}", training)

        def safetensors(number: int) -> Took:
            trained(number)
            return timed_safetensors_save(work / f"{number}.safetensors", training)

        variants = {OURS: ours, BASE: theirs, OURS_PLAIN: uncompressed, OURS_UNCHANGED: unchanged, DCP: dcp}
        variants |= {SAFETENSORS: safetensors}
        measured = in_turn(rounds, variants)
    return _report("in one training", measured, raw_bytes(training.state_dicts()))


def ask_fresh(folder: Path, rounds: int) -> Report:
    """The same, each in a fresh process, which has loaded a state and trained on from there."""
    file = state_file(folder)
    real_batches(folder)
    with work_folder(folder) as work:
        ckptstore.Store(work / "store").run("first").save({"step": 0}, step=0)

        def child(name: str, number: int, **more: str) -> Took:
            took: Took = fresh(f"benchmarks.save:{name}", file=str(file), work=str(work), number=number, **more)
            return took

        measured = in_turn(
            rounds,
            {
                # Each of ours another state, of which nothing is in the store.
                OURS: lambda number: child("fresh_ours", 2 * number + 1, kernels="numpy"),
                OURS_FAST: lambda number: child("fresh_ours", 2 * number + 2, kernels="numba"),
                BASE: lambda number: child("fresh_theirs", number),
            },
        )
    return _report("each in a fresh process", measured, raw_bytes(torch.load(file)))


def _report(where: str, measured: dict[str, list[Took]], payload_bytes: int) -> Report:
    rows = compared(measured, BASE, payload_bytes)
    verdict = target(f"speed / that of {BASE} is", rows[0].figures["speed"], at_least=TARGET)
    return Report(f"{QUESTION}; {where}", rows, verdict)


def fresh_ours(file: str, work: str, number: int, kernels: str) -> Took:
    import ckptstore.saving

    use_kernels(kernels)
    return timed_save(ckptstore.Store(Path(work) / "store").run("lstm"), another(file, number))


def fresh_theirs(file: str, work: str, number: int) -> Took:
    return timed_torch_save(Path(work) / f"{number}.pt", another(file, number))


def timed_save(run: ckptstore.Run, training: Training, *, must_be_new: bool = True) -> Took:
    with Stopwatch() as watch:
        checkpoint = run.save(training.state(), step=training.step)
    if must_be_new:
        assert checkpoint.new_bytes > 0.99 * checkpoint.stored_bytes, checkpoint
    return watch.took


def timed_torch_save(file: Path, training: Training) -> Took:
    with Stopwatch() as watch:
        torch.save(training.state_dicts(), file)
        for path in (file, file.parent):
            fsync(path)
    file.unlink()
    return watch.took


def timed_safetensors_save(file: Path, training: Training) -> Took:
    """What is not a tensor is left out, as the format holds tensors alone."""
    from safetensors.torch import save_file

    with Stopwatch() as watch:
        save_file(flat_tensors(training), file)
        for path in (file, file.parent):
            fsync(path)
    file.unlink()
    return watch.took


def timed_dcp_save(folder: Path, training: Training) -> Took:
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = synced_writer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that this is one process
        with Stopwatch() as watch:
            save(training.state_dicts(), storage_writer=writer)
    shutil.rmtree(folder)
    return watch.took


def synced_writer(folder: Path) -> Any:
    """DCP's writer of files, with fsync as we do it, and with as many threads as this machine has cores."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    threads = worker_threads()
    return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=threads)


def flat_tensors(training: Training) -> dict[str, torch.Tensor]:
    """All tensors of model and optimizer by one name each, as safetensors wants them."""
    states = training.optimizer.state_dict()["state"]
    flat = {f"model.{name}": tensor for name, tensor in training.model.state_dict().items()}
    return flat | {
        f"optimizer.{number}.{name}": value for number, state in states.items() for name, value in state.items()
    }


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def another(file: str, number: int) -> Training:
    """The state after so many more steps that no other number leads to it.

    One step on another part of the text would not do: the moments of words that are in neither part come out the same.
    """
    training = Training.resumed(file)
    training.train(real_batches(Path(file).parent), number + 2)
    return training
