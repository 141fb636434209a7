"""How long a restore takes in a process that has just begun, compared with torch.load.

Both end with the same: model and optimizer hold the state. Ours has compared each byte with its digest by then.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import ckptstore
from benchmarks.save import flat_tensors
from benchmarks.states import STEPS, Training, raw_bytes, state_file, work_folder
from benchmarks.timing import Report, Stopwatch, Took, compared, fresh, in_turn, target, use_kernels

QUESTION = "restore: LSTM and Adam from local disk, page cache warm, each in a fresh process"
TARGET = 0.7
BASE = "torch.load"
OURS = "ckptstore (verified)"
OURS_FAST = "ckptstore[fast] (verified)"
OURS_PLAIN = "ckptstore, codec none"
OURS_PART = "ckptstore, the model alone"
SAFETENSORS = "safetensors load_file"


def ask(folder: Path, rounds: int) -> Report:
    file = state_file(folder)
    with work_folder(folder) as work:
        training = Training.resumed(file)
        ckptstore.Store(work / "store").run("lstm").save(training.state(), step=STEPS)
        ckptstore.Store(work / "plain", codec="none").run("lstm").save(training.state(), step=STEPS)
        save_file(flat_tensors(training), work / "state.safetensors")
        for path in [file, work / "state.safetensors", *(work / "store").rglob("*"), *(work / "plain").rglob("*")]:
            if path.is_file():
                path.read_bytes()  # into the page cache

        loading = partial(fresh, "benchmarks.restore:torch_restore", file=str(file))
        restoring = partial(fresh, "benchmarks.restore:our_restore", store=str(work / "store"))
        variants = {
            OURS: lambda _: restoring(kernels="numpy"),
            OURS_FAST: lambda _: restoring(kernels="numba"),
            OURS_PLAIN: lambda _: fresh("benchmarks.restore:our_restore", store=str(work / "plain"), kernels="numpy"),
            OURS_PART: lambda _: restoring(kernels="numpy", part=True),
            BASE: lambda _: loading(),
            "torch.load(mmap=True)": lambda _: loading(mmap=True),
            "torch.load(weights_only=False)": lambda _: loading(weights_only=False),
            SAFETENSORS: lambda _: fresh(
                "benchmarks.restore:safetensors_restore", file=str(work / "state.safetensors")
            ),
        }
        measured = in_turn(rounds, variants)
    rows = compared(measured, BASE, raw_bytes(training.state_dicts()))
    return Report(QUESTION, rows, target(f"speed / that of {BASE} is", rows[0].figures["speed"], at_least=TARGET))


def our_restore(store: str, kernels: str, part: bool = False, step: int | None = None) -> Took:
    import ckptstore.restoring

    use_kernels(kernels)
    training = Training.fresh()
    run = ckptstore.Store(store).run("lstm")
    destination = {"model": training.model} if part else {"model": training.model, "optimizer": training.optimizer}
    with Stopwatch() as watch:
        checkpoint = run.restore(destination, step=step)
    assert checkpoint is not None and len(training.optimizer.state) == (0 if part else 7)
    return watch.took


def safetensors_restore(file: str) -> Took:
    """The optimizer's groups are not in the file: they are those of the new optimizer."""
    from safetensors.torch import load_file

    training = Training.fresh()
    with Stopwatch() as watch:
        tensors = load_file(file)
        model = {name.removeprefix("model."): each for name, each in tensors.items() if name.startswith("model.")}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, moment = name.split(".")
                moments.setdefault(int(number), {})[moment] = tensor
        training.model.load_state_dict(model)
        training.optimizer.load_state_dict(training.optimizer.state_dict() | {"state": moments})
    assert len(training.optimizer.state) == 7
    return watch.took


def torch_restore(file: str, **options: Any) -> Took:
    training = Training.fresh()
    with Stopwatch() as watch:
        state = torch.load(file, **options)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
    assert len(training.optimizer.state) == 7
    return watch.took
