"""Processes of one gloo group that call the same function, each with its rank; what they return comes back as JSON.

They are started once and called many times, because each of them imports torch.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60


class Ranks:
    """The processes."""

    def __init__(self, size: int, folder: str) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", folder, str(rank), str(size)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def call(self, function: str, **arguments: Any) -> list[Any]:
        """Call "module:function" with `arguments` in all of them; what each returns, by rank.

        If one raises, so does this, with all tracebacks; the processes are of no use then.
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([function, arguments]) + "\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline() or '{"raised": "the process has ended"}'))
        wrong = [f"process {rank}:\n{answer['raised']}" for rank, answer in enumerate(answers) if "raised" in answer]
        assert not wrong, "\n".join(wrong)
        return [answer["returned"] for answer in answers]

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """Start them; end them when the block is left."""
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(size, folder)
        try:
            yield started
        finally:
            started.end()


def main() -> None:
    """What runs in each process."""
    folder, rank, size = sys.argv[1:]
    import torch
    import torch.distributed as dist

    answers, sys.stdout = sys.stdout, sys.stderr  # what is printed must not pass for an answer
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=SECONDS),
    )
    for line in sys.stdin:
        function, arguments = json.loads(line)
        module, _, name = function.partition(":")
        try:
            answer = {"returned": getattr(importlib.import_module(module), name)(**arguments)}
        except BaseException:  # handed over to the test
            answer = {"raised": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
