"""How long a save to an S3 bucket takes, and a restore back, compared with torch.save and an upload of the file.

The server is SeaweedFS on this machine, which shares the processor with its clients: there is no network to wait for,
so what counts is how much work each way makes. Each restore is in a fresh process.
"""

import io
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ckptstore
from benchmarks.requests import KINDS
from benchmarks.states import STEPS, Training, raw_bytes, real_batches, state_file
from benchmarks.timing import Report, Stopwatch, Took, compared, fresh, in_turn, target, use_kernels

SAVE_QUESTION = "bucket-save: LSTM and Adam to SeaweedFS on this machine, all of it new"
RESTORE_QUESTION = "bucket-restore: the same back, each in a fresh process"
TARGET = 1.5
BASE, DCP = "torch.save + s3fs", "DCP FsspecWriter"
OURS = {"ckptstore": "s3fs", "ckptstore with obstore": "obstore"}
"""Our own ways, and the client of S3 for each."""


def ask_save(folder: Path, rounds: int) -> Report:
    """How long a save to an S3 bucket takes, compared with torch.save and an upload of the file."""
    from tests.servers import running_seaweed

    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    with running_seaweed() as server:
        url, options = f"s3://{server.new_bucket()}", server.storage_options
        runs = {
            name: ckptstore.Store(KINDS[client](f"{url}/{client}", options)).run("lstm")
            for name, client in OURS.items()
        }
        training.train(batches, 1)
        for run in runs.values():
            run.save(training.state(), step=0)  # makes the store and the connections
        _upload(f"{url}/warm.pt", options, training)

        def trained(number: int) -> None:
            training.train(batches, number + STEPS + 3 - training.step)

        def ours(run: ckptstore.Run, number: int) -> Took:
            trained(number)
            with Stopwatch() as watch:
                checkpoint = run.save(training.state(), step=training.step)
            assert checkpoint.new_bytes > 0.99 * checkpoint.stored_bytes
            return watch.took

        def theirs(number: int) -> Took:
            trained(number)
            with Stopwatch() as watch:
                _upload(f"{url}/{number}.pt", options, training)
            return watch.took

        def dcp(number: int) -> Took:
            trained(number)
            with Stopwatch() as watch:
                _dcp_save(f"{url}/dcp-{number}", options, training)
            return watch.took

        variants = {name: partial(ours, run) for name, run in runs.items()}
        measured = in_turn(rounds, {**variants, BASE: theirs, DCP: dcp})
    rows = compared(measured, BASE, raw_bytes(training.state_dicts()))
    return Report(SAVE_QUESTION, rows, target(f"speed / that of {BASE} is", rows[0].figures["speed"], at_least=TARGET))


def ask_restore(folder: Path, rounds: int) -> Report:
    """How long a restore from an S3 bucket takes, compared with a download of the file and torch.load."""
    from tests.servers import running_seaweed

    training = Training.resumed(state_file(folder))
    with running_seaweed() as server:
        place: dict[str, Any] = {"url": f"s3://{server.new_bucket()}", "options": server.storage_options}
        ckptstore.Store(f"{place['url']}/ckpts", place["options"]).run("lstm").save(training.state(), step=1)
        _upload(f"{place['url']}/state.pt", place["options"], training)
        _dcp_save(f"{place['url']}/dcp", place["options"], training)
        theirs = {BASE: "torch_restore", DCP: "dcp_restore"}
        variants = {
            name: partial(_in_child, "our_restore", {**place, "client": client}) for name, client in OURS.items()
        }
        variants |= {name: partial(_in_child, function, place) for name, function in theirs.items()}
        measured = in_turn(rounds, variants)
    rows = compared(measured, BASE, raw_bytes(training.state_dicts()))
    return Report(
        RESTORE_QUESTION, rows, target(f"speed / that of {BASE} is", rows[0].figures["speed"], at_least=TARGET)
    )


def _in_child(function: str, place: dict[str, Any], _: int) -> Took:
    took: Took = fresh(f"benchmarks.bucket:{function}", **place)
    return took


def our_restore(url: str, options: dict[str, Any], client: str) -> Took:
    import ckptstore.restoring

    use_kernels(os.environ.get("CKPTSTORE_KERNELS", "numpy"))
    training = Training.fresh()
    run = ckptstore.Store(KINDS[client](f"{url}/ckpts", options)).run("lstm")
    run._objects.connect()  # the others import s3fs before the clock starts, too
    with Stopwatch() as watch:
        assert run.restore({"model": training.model, "optimizer": training.optimizer}) is not None
    return watch.took


def torch_restore(url: str, options: dict[str, Any]) -> Took:
    training = Training.fresh()
    fs = _file_system(options)
    with Stopwatch() as watch:
        state = torch.load(io.BytesIO(fs.cat_file(f"{url}/state.pt")))
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
    return watch.took


def dcp_restore(url: str, options: dict[str, Any]) -> Took:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    warnings.simplefilter("ignore")  # it says that this is one process
    training = Training.fresh()
    _file_system(options)
    with Stopwatch() as watch:
        model, optimizer = get_state_dict(training.model, training.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        load(state, storage_reader=FsspecReader(url + "/dcp", **options))
        set_state_dict(training.model, training.optimizer, model_state_dict=model, optim_state_dict=state["optimizer"])
    return watch.took


def _upload(path: str, options: dict[str, Any], training: Training) -> None:
    content = io.BytesIO()
    torch.save(training.state_dicts(), content)
    _file_system(options).pipe_file(path, content.getbuffer().tobytes())


def _dcp_save(path: str, options: dict[str, Any], training: Training) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model, optimizer = get_state_dict(training.model, training.optimizer)
    save({"model": model, "optimizer": optimizer}, storage_writer=FsspecWriter(path, **options))


def _file_system(options: dict[str, Any]) -> Any:
    import fsspec

    fs = fsspec.filesystem("s3", **options)
    fs.connect()
    return fs
