"""Run an example as its first user does: an empty environment, its extra installed, killed halfway, started again.

python examples/from_empty.py lightning        (or several; all if none is named)

The environment is made in a temporary folder and removed. `make examples` runs all.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES: dict[str, tuple[str, list[str]]] = {
    # name -> the example, and what its how-to page says to install; of TensorFlow the build without CUDA
    "accelerate": ("accelerate_gru.py", [".[accelerate]"]),
    "keras": ("keras_lstm.py", [".[keras,trainer]", "tensorflow-cpu"]),
    "lightning": ("lightning_lstm.py", [".[lightning]"]),
    "transformers": ("transformers_gpt2.py", [".[transformers]"]),
}
SECONDS = 300


def main() -> int:
    names = sys.argv[1:] or list(EXAMPLES)
    if unknown := [name for name in names if name not in EXAMPLES]:
        print(f"there is no example called {unknown[0]}; there are {', '.join(EXAMPLES)}", file=sys.stderr)
        return 2
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"ckptstore-{name}-"))
        try:
            run(name, folder)
        finally:
            shutil.rmtree(folder)
    return 0


def run(name: str, folder: Path) -> None:
    script, wanted = EXAMPLES[name]
    began = time.monotonic()
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    packages = [str(ROOT) + each[1:] if each.startswith(".") else each for each in wanted]
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
    ]
    if index := os.environ.get("TORCH_INDEX"):
        pip += ["--extra-index-url", index]
    subprocess.run([*pip, *packages], check=True)
    installed = time.monotonic()
    # A copy, so that nothing of the checkout can be imported but the trainer's reader of texts, which one uses.
    shutil.copy(ROOT / "examples" / script, folder)
    if name == "keras":
        shutil.copytree(ROOT / "trainer", folder / "trainer")
    command = [str(python), script, "--store", "ckpts"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    killed_with = _kill_after_first_save(command, folder, environment)
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=SECONDS)
    steps = _checkpoints(folder)
    if len(steps) < len(killed_with) or not steps:
        raise SystemExit(f"{name}: there were {len(killed_with)} checkpoints when it was killed, and {len(steps)} now")
    subprocess.run([python, "-m", "ckptstore", "verify", "ckpts"], cwd=folder, env=environment, check=True)
    print(
        f"{name}: installed in {installed - began:.0f} s, killed with {len(killed_with)} checkpoints, gone on to "
        f"{len(steps)}; {time.monotonic() - installed:.0f} s",
        flush=True,
    )


def _kill_after_first_save(command: list[str], folder: Path, environment: dict[str, str]) -> set[str]:
    process = subprocess.Popen(command, cwd=folder, env=environment)
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline and not _checkpoints(folder):
        time.sleep(0.02)
    if process.poll() is not None:
        raise SystemExit(f"it ended (exit status {process.returncode}) before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = _checkpoints(folder)
    if not found:
        raise SystemExit(f"there was no checkpoint after {SECONDS} s")
    return found


def _checkpoints(folder: Path) -> set[str]:
    """The manifests of checkpoints; fences and tombstones are shorter."""
    return {path.name for path in (folder / "ckpts" / "runs").rglob("*.json") if path.stat().st_size >= 1024}


if __name__ == "__main__":
    sys.exit(main())
