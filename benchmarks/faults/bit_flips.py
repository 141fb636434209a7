"""A bit flips in the bytes of a tensor on the disk."""

import random
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ckptstore
from benchmarks.faults.scenes import (
    NEW,
    OLD,
    Attempt,
    Fault,
    Row,
    attempt,
    dcp,
    dcp_load,
    is_state,
    loads,
    our_load,
    state,
    which,
)

SOUND = "the new state"
FLIPS = 64
SEED = 7


@dataclass(frozen=True)
class Region:
    """Bytes of a file that belong to tensors."""

    file: Path
    start: int
    length: int


def run(folder: Path) -> Fault:
    ours = _our_flips(folder / "store")
    peers = {
        "flip-torch": ("`torch.load`", _torch(folder)),
        "flip-dcp": ("`dcp.load`", _dcp(folder)),
        "flip-safetensors": ("`safetensors.torch.load_file`", _safetensors(folder)),
        "flip-zip": ("the same file of `torch.save`, `zipfile.ZipFile.testzip`", _testzip(folder)),
    }
    title = f"A bit flips in a tensor on the disk, {FLIPS} random ones in turn"
    return Fault(
        title, [Row(key, peer, _text(facts), _our_text(ours), facts, ours) for key, (peer, facts) in peers.items()]
    )


def _text(facts: dict[str, Any]) -> str:
    return f"noticed: {facts['noticed']} of {facts['flips']}"


def _our_text(facts: dict[str, Any]) -> str:
    return f"{_text(facts)}; `run.restore` gave {facts['restore']}{', with a warning' if facts['warned'] else ''}"


def _flips(regions: list[Region], load: Callable[[], str]) -> dict[str, Any]:
    """Flip one bit, load, flip it back; how many loads did not give the sound state as if nothing were wrong."""
    assert load() == SOUND
    source = random.Random(SEED)
    outcomes = []
    for _ in range(FLIPS):
        region = source.choices(regions, [each.length for each in regions])[0]
        position, bit = region.start + source.randrange(region.length), 1 << source.randrange(8)
        _flip(region.file, position, bit)
        outcomes.append(load())
        _flip(region.file, position, bit)
    assert load() == SOUND
    unnoticed = [outcome for outcome in outcomes if outcome.endswith("without an error") or outcome == SOUND]
    return {"flips": FLIPS, "noticed": FLIPS - len(unnoticed), "outcomes": dict(Counter(outcomes))}


def _flip(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ bit]))


def _tensors_in(*files: Path) -> list[Region]:
    """Where the raw bytes of the state's tensors are: none of the peers compresses them."""
    regions = []
    for file in files:
        content = file.read_bytes()
        for part in state(NEW).values():
            if isinstance(part, torch.Tensor):
                raw = part.numpy().tobytes()
                regions.append(Region(file, content.index(raw), len(raw)))
    return regions


def _saved_by_torch(folder: Path) -> Path:
    file = folder / "state.pt"
    torch.save(state(NEW), file)
    return file


def _torch(folder: Path) -> dict[str, Any]:
    file = _saved_by_torch(folder)
    return _flips(_tensors_in(file), lambda: loads(lambda: torch.load(file)))


def _testzip(folder: Path) -> dict[str, Any]:
    file = _saved_by_torch(folder)

    def load() -> str:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        return f"{damaged} is damaged" if damaged else SOUND

    return _flips(_tensors_in(file), load)


def _dcp(folder: Path) -> dict[str, Any]:
    place = folder / "dcp"
    dcp().save(state(NEW), checkpoint_id=place)
    return _flips(_tensors_in(*place.glob("*.distcp")), lambda: dcp_load(place))


def _safetensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    file = folder / "state.safetensors"
    save_file({name: part for name, part in state(NEW).items() if name != "step"}, file)
    return _flips(_tensors_in(file), lambda: loads(lambda: load_file(file) | {"step": NEW}))


def _our_flips(place: Path) -> dict[str, Any]:
    """Anywhere in the objects of chunks: what they hold besides the tensors' bytes counts as well."""
    store = ckptstore.Store(place)
    store.run("peers").save(state(OLD), step=OLD)
    before = set(place.glob("chunks/*/*"))
    store.run("peers").save(state(NEW), step=NEW)
    chunks = sorted(set(place.glob("chunks/*/*")) - before)
    facts = _flips([Region(file, 0, file.stat().st_size) for file in chunks], lambda: our_load(store))
    _flip(chunks[0], 100, 1)
    into = state(NEW) | {"weight": torch.zeros_like(state(NEW)["weight"])}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        restored: Attempt = attempt(lambda: store.run("peers").restore(into))
    facts["warned"] = any(issubclass(each.category, ckptstore.CheckpointWarning) for each in warned)
    found = restored.value.state | {name: into[name] for name in ("weight", "moment")} if restored.value else {}
    facts["restore"] = restored.error_name or ("the old state" if is_state(found, OLD) else which(found))
    return facts
