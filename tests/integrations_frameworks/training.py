"""Examples run as programs of their own, and killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 120


def run_example(name: str, *arguments: object, cwd: Path, processes: int = 1) -> str:
    """Run it to its end; returns what it printed."""
    command = _command(name, arguments)
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command[1:1] = launcher
    result = subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def kill_example(name: str, *arguments: object, cwd: Path, when: Callable[[], bool]) -> None:
    """Start it, and kill it as soon as `when` is true."""
    with (cwd / "killed.log").open("wb") as log:
        process = subprocess.Popen(_command(name, arguments), cwd=cwd, env=_environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not when():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
    assert ended == -signal.SIGKILL, (cwd / "killed.log").read_text(encoding="utf-8")


def _command(name: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def damage_newest(folder: Path, before: set[Path]) -> None:
    """Damage the chunks of the store in `folder` that were not there `before`."""
    for path in chunks(folder) - before:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def chunks(folder: Path) -> set[Path]:
    return {path for path in (folder / "chunks").rglob("*") if path.is_file()}
