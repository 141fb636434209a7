"""Programs that deduplicate, and that people use for checkpoints: restic and borg, where they are installed.

Both back up the file that torch.save wrote, as their users do; writing that file counts as part of the save.
"""

import os
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.states import Training
from benchmarks.timing import Stopwatch, Took


class Peer:
    """One of them, with a repository of its own."""

    name: str
    program: str

    def __init__(self, folder: Path) -> None:
        self.repository = folder / self.program
        self.file = folder / f"{self.program}-state" / "state.pt"
        self.file.parent.mkdir()
        self.environment = {**os.environ, "HOME": str(folder), "RESTIC_PASSWORD": "benchmark", "BORG_PASSPHRASE": ""}
        self._run(self.init_command())

    def save(self, training: Training) -> Took:
        with Stopwatch() as watch:
            torch.save(training.state_dicts(), self.file)
            self._run(self.save_command(training.step))
        return watch.took

    def restore(self, step: int, into: Path) -> Took:
        """The file back; loading it is not counted."""
        into.mkdir()
        with Stopwatch() as watch:
            self._run(self.restore_command(step, into), cwd=into)
        assert next(into.rglob("state.pt")).stat().st_size > 0
        shutil.rmtree(into)
        return watch.took

    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.repository.rglob("*") if path.is_file())

    def init_command(self) -> list[str]:
        raise NotImplementedError

    def save_command(self, step: int) -> list[str]:
        raise NotImplementedError

    def restore_command(self, step: int, into: Path) -> list[str]:
        raise NotImplementedError

    def _run(self, command: list[str], cwd: Path | None = None) -> None:
        subprocess.run(command, check=True, env=self.environment, cwd=cwd, stdout=subprocess.DEVNULL)


class Restic(Peer):
    name, program = "restic (compression auto)", "restic"

    def init_command(self) -> list[str]:
        return ["restic", "-q", "-r", str(self.repository), "init"]

    def save_command(self, step: int) -> list[str]:
        return ["restic", "-q", "-r", str(self.repository), "backup", "--tag", str(step), str(self.file)]

    def restore_command(self, step: int, into: Path) -> list[str]:
        tag = str(step)
        return ["restic", "-q", "-r", str(self.repository), "restore", "latest", "--tag", tag, "--target", str(into)]


class Borg(Peer):
    name, program = "borg (zstd,3)", "borg"

    def init_command(self) -> list[str]:
        return ["borg", "init", "-e", "none", str(self.repository)]

    def save_command(self, step: int) -> list[str]:
        return ["borg", "create", "--compression", "zstd,3", f"{self.repository}::{step}", str(self.file)]

    def restore_command(self, step: int, into: Path) -> list[str]:
        return ["borg", "extract", f"{self.repository}::{step}"]


def installed(folder: Path) -> list[Peer]:
    """Those that can be run here, each with a new repository."""
    return [peer(folder) for peer in (Restic, Borg) if shutil.which(peer.program)]
