"""A file whose pickle runs code when it is loaded. The code makes an empty file, so that one sees that it ran."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ckptstore
from benchmarks.faults.scenes import OLD, Fault, Row, any_of, attempt, dcp_load, our_load, state

TITLE = "A checkpoint from elsewhere holds a pickle that runs code"


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.trace,)


def run(folder: Path) -> Fault:
    trace, file = folder / "code-ran", folder / "hostile.pt"
    torch.save(Hostile(trace), file)
    ours = _ours(folder, trace, file)
    peers = {
        "pickle-torch": ("`torch.load`, its default", lambda: torch.load(file)),
        "pickle-torch-unsafe": ("`torch.load(weights_only=False)`", lambda: torch.load(file, weights_only=False)),
        "pickle-dcp": ("`dcp.load`; the pickle is its `.metadata`", lambda: _dcp(folder / "dcp", trace)),
        "pickle-safetensors": ("`safetensors.torch.load_file`", lambda: _safetensors(folder, trace)),
    }
    rows = []
    for key, (peer, load) in peers.items():
        facts = _tried(trace, load)
        rows.append(Row(key, peer, _text(facts), _our_text(ours), facts, ours))
    return Fault(TITLE, rows)


def _tried(trace: Path, load: Callable[[], Any]) -> dict[str, Any]:
    trace.unlink(missing_ok=True)
    tried = attempt(load)
    return {"code_ran": trace.exists(), "raised": tried.error_name}


def _text(facts: dict[str, Any]) -> str:
    if facts["code_ran"]:
        return "the code ran"
    return f"no code ran: {facts['raised']}" if facts["raised"] else "no code ran, no error"


def _dcp(place: Path, trace: Path) -> None:
    place.mkdir()
    (place / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    dcp_load(place)


def _safetensors(folder: Path, trace: Path) -> None:
    from safetensors.torch import load_file

    file = folder / "hostile.safetensors"
    file.write_bytes(pickle.dumps(Hostile(trace)))
    load_file(file)


def _ours(folder: Path, trace: Path, file: Path) -> dict[str, Any]:
    """The pickle in the place of each object of a store in turn, and the file of torch.save imported."""
    place = folder / "store"
    store = ckptstore.Store(place)
    store.run("peers").save(state(OLD), step=OLD)
    gave, ran = [], False
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Hostile(trace)))
        trace.unlink(missing_ok=True)
        gave.append(our_load(ckptstore.Store(place)))
        ran |= trace.exists()
        path.write_bytes(content)
    imported = _tried(trace, lambda: store.run("peers").import_file(file, step=OLD + 1))
    ran |= imported["code_ran"]
    return {"code_ran": ran, "load": gave, "import": imported["raised"]}


def _our_text(facts: dict[str, Any]) -> str:
    code = "the code ran" if facts["code_ran"] else "no code ran"
    loaded = f"in the place of each object in turn, loading gives {any_of(facts['load'])}"
    return f"{code}: {loaded}; `run.import_file`: {facts['import'] or 'taken'}"
