"""The machine that figures come from, in words: a figure without it says little."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def facts(folder: Path) -> dict[str, str]:
    """Processor, cores, memory, file system of `folder`, and the versions of what is measured."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "disk": _file_system(folder),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "zstandard", "blake3")},
    }


def sentence(known: dict[str, str]) -> str:
    """The same in a line, as it stands below plots."""
    cores = f"{known['cores']} cores of {known['processor']}, {known['memory']}, {known['disk']}"
    return f"{cores}, {known['system']}, Python {known['python']}, torch {known['torch']}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.machine()


def _file_system(folder: Path) -> str:
    command = ["stat", "--file-system", "--format=%T", str(folder)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return found.stdout.strip().replace("ext2/ext3", "ext4") or "unknown file system"


def _version(package: str) -> str:
    return importlib.metadata.version(package)
