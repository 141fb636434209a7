"""Processes that hold a gloo process group and do, all at the same time, what a test asks of them.

They are started once and serve many tests: starting one takes seconds. A function that they are asked to run is given
its rank; what it returns, or the text of what it raised, comes back.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120


class Failed(Exception):
    """What a rank raised: `error` itself, where it can be sent, and its traceback as the text."""

    def __init__(self, text: str, error: BaseException | None) -> None:
        super().__init__(text)
        self.error = error


class Ranks:
    """So many processes, from rank 0 on."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, self._folder.name))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Let every rank run `function(rank, *args)`."""
        for pipe in self._pipes:
            pipe.send((function, args))

    def outcome(self, rank: int) -> Any:
        """What it returned, or a Failed; None if the process is gone."""
        if not self._pipes[rank].poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"rank {rank} does not answer")
        try:
            is_good, value = self._pipes[rank].recv()
        except EOFError:
            return None
        return value if is_good else Failed(value[0], None if value[1] is None else pickle.loads(value[1]))

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run it, and return what each rank returned, or a Failed."""
        self.start(function, *args)
        return [self.outcome(rank) for rank in range(len(self._pipes))]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run it; raises what the first rank that failed has raised."""
        found = self.outcomes(function, *args)
        for rank, each in enumerate(found):
            if isinstance(each, Failed):
                raise AssertionError(f"rank {rank}: {each}")
        return found

    def stop(self) -> None:
        """End all of them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, count: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # where async_save puts its processes
    import torch
    import torch.distributed
    from torch.distributed.checkpoint import _async_process_executor

    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT_SECONDS)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            _async_process_executor._CHECKPOINT_PROCESS = None  # it is asked to end, if there is one
            os._exit(0)  # no time for goodbyes that other ranks may not answer
        try:
            answer: Any = (True, function(rank, *args))
        except BaseException as error:
            answer = (False, (traceback.format_exc(), _pickled(error)))
        pipe.send(answer)


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:
        return None
