"""Kinds of input: how one is made of a seed, and what reads it. An input is parts by name, so that it can be saved."""

import contextlib
import io
import itertools
import json
import struct
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore import chunk, errors, run, saving
from ckptstore.assembly import Assembly
from ckptstore.checkpoint import Checkpoint
from ckptstore.cli import main, target
from ckptstore.codec import Sampled
from ckptstore.deltas import find_bases, held_chunks
from ckptstore.format import (
    MAX_CHUNK_BYTES,
    MIN_MANIFEST_BYTES,
    Codec,
    ManifestKey,
    condemned_key,
    manifest_key,
    new_save_id,
    session_key,
)
from ckptstore.kernels import PLANE_WIDTHS
from ckptstore.manifest import (
    Condemned,
    Ended,
    Manifest,
    Session,
    TensorPaths,
    Writer,
    decode_condemned,
    decode_manifest,
    decode_marker,
    decode_session,
    encode,
)
from ckptstore.objects.memory import MemoryObjects
from ckptstore.sealed import unseal
from ckptstore.skeleton import find, leaves, tensors
from ckptstore.testing import RecordingObjects
from ckptstore.tree import unflatten
from tests import joint
from tests.fuzz import mutating
from tests.fuzz.mutating import SAVES
from tests.fuzz.watching import Watched, watch

Parts = dict[str, bytes]
TIME = "2026-11-25T01:02:03.000004Z"
WRITER = Writer(host="node7", pid=1, version="0")
MAX_DOCUMENT_BYTES = 2**18
"""Where several changes made a longer one, it is left out: it takes its time because it is long."""
TOO_MUCH = 2**26
"""What is rightly claimed beyond this is left out: reading it takes the time and memory that it says."""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: an input of a seed; None where the seed leads to one that rightly takes long to read.
        read: reads an input and tells what came of it.
        share: how many of a hundred inputs are of this kind.
    """

    make: Callable[[Random], Parts | None]
    read: Callable[[Parts], Watched]
    share: int


# ---- chunks


@cache
def valid_chunks() -> list[Parts]:
    """Chunks of every codec, element size and mode, and deltas of every element size."""
    numbers = np.random.default_rng(7)
    raws = {
        "zeros": np.zeros(4096, np.uint8),
        "noise": numbers.integers(0, 256, 4096, np.uint8),
        "weights": numbers.normal(0, 0.05, 2048).astype("<f4").view(np.uint8),
        "counter": np.arange(512, dtype="<i8").view(np.uint8),
        "short": np.array([1, 0, 0, 0, 2, 0, 0, 0], np.uint8),
    }
    found = []
    for raw in raws.values():
        base = np.roll(raw, 8)
        for element in PLANE_WIDTHS:
            delta = chunk._encode(Sampled(raw, element, base), chunk.Base(chunk.digest(base), base))
            found.append(_chunk_parts(delta.tobytes(), raw) | {"base": base.tobytes()})
            found.append(_chunk_parts(chunk.encode(raw, element).tobytes(), raw))
        found.append(_chunk_parts(chunk.encode(raw, 1, "none").tobytes(), raw))
    return found


def _chunk_parts(content: bytes, raw: "np.ndarray[Any, Any]") -> Parts:
    return {"content": content, "digest": chunk.digest(raw).encode(), "length": str(len(raw)).encode()}


def make_chunk(random: Random) -> Parts:
    parts = dict(random.choice(valid_chunks()))
    content, other = parts["content"], random.choice(valid_chunks())["content"]
    parts["content"] = (mutating.hostile_chunk if random.random() < 0.7 else mutating.edited)(random, content, other)
    if random.random() < 0.1:
        parts["length"] = str(random.choice([1, 8, 4095, 4096, 2**16])).encode()
    if random.random() < 0.1:
        parts.pop("base", None)
    return parts


def read_chunk(parts: Parts) -> Watched:
    content, length = parts["content"], int(parts["length"])
    base = None
    if "base" in parts:
        raw = np.resize(np.frombuffer(parts["base"], np.uint8), length)
        base = chunk.Base(chunk.digest(np.frombuffer(parts["base"], np.uint8)), raw)

    def act() -> str | None:
        assert chunk.is_delta(content) in (True, False)
        with contextlib.suppress(errors.CorruptError):
            if not 0 < chunk.raw_length(content) <= MAX_CHUNK_BYTES:
                return "said that a chunk is longer than one can be"
        out = np.empty(length, np.uint8)
        with contextlib.suppress(errors.CorruptError):
            chunk.decode(content, None, out, base)
        chunk.decode(content, parts["digest"].decode(), out, base)
        return None if chunk.digest(out) == parts["digest"].decode() else "took other bytes for those of a digest"

    return watch(act, size=len(content), claimed_bytes=4 * length)


# ---- documents


@cache
def valid_documents() -> dict[str, list[tuple[str, Any]]]:
    """Key and JSON value of what stands in the stores, by kind."""
    found: dict[str, list[tuple[str, Any]]] = {name: [] for name in _READERS}
    for objects in valid_stores():
        for key, content in objects.items():
            if name := _kind_of(key):
                found[name].append((key, msgspec.json.decode(unseal(content, key))))
    return found


def _kind_of(key: str) -> str | None:
    return {"ckptstore.json": "marker", "sessions": "session", "condemned": "condemned", "runs": "manifest"}.get(
        key.partition("/")[0]
    )


def _document_maker(name: str) -> Callable[[Random], Parts | None]:
    def make(random: Random) -> Parts | None:
        key, value = random.choice(valid_documents()[name])
        content = hostile_document(random, key, value)
        return {key: content} if len(content) <= MAX_DOCUMENT_BYTES else None

    return make


def hostile_document(random: Random, key: str, value: Any) -> bytes:
    is_committed = isinstance(value, dict) and value.get("state") == "committed"
    content = mutating.resealed(
        random, mutating.with_hostile_values(random, value), MIN_MANIFEST_BYTES if is_committed else 0
    )
    return mutating.edited(random, content) if random.random() < 0.1 else content


def read_document(parts: Parts) -> Watched:
    [(key, content)] = parts.items()
    name = _kind_of(key)
    assert name is not None
    return watch(lambda: _READERS[name](content, key), size=len(content))


def _read_manifest(content: bytes, key: str) -> None:
    parsed = ManifestKey.parse(key)
    assert parsed is not None
    value = decode_manifest(content, parsed)
    if isinstance(value, Manifest):
        read_manifest(value)


def read_manifest(value: Manifest) -> None:
    """All that is done with a manifest without its chunks. What one part of it makes impossible keeps no other back."""
    problems: list[errors.CheckpointError] = []
    checkpoint = Checkpoint(value)
    for act in (
        lambda: repr(checkpoint),
        lambda: checkpoint.state,
        lambda: checkpoint.metrics,
        lambda: checkpoint.digest,
        lambda: checkpoint.metadata,
        checkpoint.tensors,
        lambda: sum(1 for _ in leaves(value.tree)),
        lambda: sum(1 for _ in tensors(value.tree, value.segment_bytes)),
        lambda: _found(value.tree),
        lambda: held_chunks(value),
        lambda: [
            paths.of(index) for paths in [TensorPaths(value, range(len(value.chunks)))] for index in paths._segments
        ],
        lambda: find_bases(range(9), [each.raw for each in value.chunks][:9], value.tree, value.segments, value),
        lambda: unflatten(value.tree, lambda node, path: node, value.segment_bytes),
    ):
        try:
            act()
        except errors.CheckpointError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _found(tree: Any) -> None:
    for path in ("model.weight", "views[0].x", ""):
        with contextlib.suppress(errors.NotFoundError):
            find(tree, path)


_READERS: dict[str, Callable[[bytes, str], Any]] = {
    "marker": decode_marker,
    "session": decode_session,
    "condemned": decode_condemned,
    "manifest": _read_manifest,
}


# ---- stores


def _state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Linear(12, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1 + step / 2**16))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * step
    optimizer.step()
    shared = torch.arange(64, dtype=torch.float64) + step
    return {
        "model": model,
        "optimizer": optimizer,
        "views": [shared, shared[8:16]],
        "half": torch.ones(5, dtype=torch.bfloat16) * step,
        "array": np.arange(9, dtype="<i4"),
        "bytes": bytes(range(256)) * 5,
        "numbers": (1, 2**70, 0.5, float("nan"), complex(1, 2), "text", "\ud800", b"x", None, True),
        "keys": {1: "a", (2, "b"): {3, 4}, "$": frozenset({"x"})},
        "scalar": np.float32(1.5),
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")],
        "step": step,
    }


@cache
def valid_stores() -> list[Parts]:
    """Stores of each codec, with deltas, fences, tombstones, sessions, condemned lists and several runs.

    And one whose checkpoints several processes have saved, so that tensors are put together of blocks.
    """
    found = []
    numbers = itertools.count(1)
    with (
        mock.patch.object(chunk, "DELTA_PAYS", 100.0),
        # The same every time, so that what is made of them follows from the seed.
        mock.patch.object(run, "now_text", lambda: TIME),
        mock.patch.multiple(
            saving,
            DEFAULT_CHUNK_BYTES=256,
            DEFAULT_SMALL_BYTES=64,
            new_save_id=lambda: f"{next(numbers):032x}",
            now_text=lambda: TIME,
            this_writer=lambda: WRITER,
        ),
        mock.patch.multiple(
            joint,
            new_joint_save_id=lambda: f"{next(numbers):032x}",
            now_text=lambda: TIME,
            this_writer=lambda: WRITER,
        ),
    ):
        codecs: tuple[Codec, ...] = ("fast", "small", "none")
        for codec in (*codecs, None):
            place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
            if codec is None:
                _fill_jointly(place)
            else:
                _fill(ckptstore.Store(place, codec=codec, threads=1))
            for key, value in _bystanders(place).items():
                place.put(key, encode(value))
            found.append({row.key: place.get(row.key) or b"" for row in place.list("")})
            for key in found[-1]:
                place.delete(key)
    return found


def _fill(store: ckptstore.Store) -> None:
    for step in (1, 2, 3):
        store.run("lstm").save(_state(step), step=step, metrics={"loss": 0.5, "bad": float("inf")})
    store.run("other").save({"x": torch.ones(3)}, step=7, metadata={"sizes": (1, 2)})
    store.run("other").save({"x": torch.zeros(3)}, step=8)
    store.run("other").delete(8)


def _fill_jointly(place: MemoryObjects) -> None:
    """Tensors cut into rows, columns and a grid, of few dimensions and of many, in chunks of their own and bundled."""
    for step in (1, 2, 3):
        parts: list[list[joint.Given]] = [[], []]
        for path, tensor in _joint_state(step).items():
            for number, (at, sizes) in enumerate(_CUTS[path]):
                shard = tensor[tuple(slice(start, start + size) for start, size in zip(at, sizes, strict=True))]
                parts[number % 2].append((tuple(path.split(".")), shard, at, tuple(tensor.shape)))
        joint.save(place, "lstm", step, parts, {"step": step, "keys": {1: "a"}}, carried_bytes=100)
    ckptstore.Store(place, threads=1).run("other").save({"half": torch.ones(5)}, step=7)


def _joint_state(step: int) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.arange(20 * 24.0).reshape(20, 24) + step,
        "model.bias": torch.arange(6.0) * step,
        "optimizer.grid": torch.arange(8 * 6 * 2.0).reshape(8, 6, 2) + step,
        "half": torch.ones(2, 1, 1, 1, 3, 1, 2, 1, dtype=torch.bfloat16) * step,
    }


_CUTS: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "model.weight": [((0, 0), (20, 10)), ((0, 10), (20, 14))],
    "model.bias": [((0,), (2,)), ((2,), (4,))],
    "optimizer.grid": [((row, column, 0), (4, 3, 2)) for row in (0, 4) for column in (0, 3)],
    "half": [((at, *[0] * 7), (1, 1, 1, 1, 3, 1, 2, 1)) for at in (0, 1)],
}


def _bystanders(place: MemoryObjects) -> dict[str, Session | Ended | Condemned]:
    some_chunk = place.list("chunks/")[0].key
    condemned = Condemned(collection=SAVES[0], reason="corrupt", created=TIME, keys=[some_chunk])
    session = Session(save=SAVES[1], run="lstm", step=9, writer=WRITER, opened=TIME, beat=3)
    fence = Ended(state="fenced", run="lstm", step=2, save=SAVES[2], created=TIME)
    return {
        condemned_key(SAVES[0]): condemned,
        session_key(SAVES[1]): session,
        manifest_key("lstm", 2, SAVES[2]): fence,
    }


def make_store(random: Random) -> Parts | None:
    objects = dict(random.choice(valid_stores()))
    for _ in range(random.choice([1, 1, 2, 3])):
        random.choice(_DAMAGES)(random, objects)
    restores = [name for name in OPERATIONS if name.startswith("restore")]
    objects["operation"] = random.choice([*OPERATIONS, *restores, *restores, *restores]).encode()
    is_long = any(len(content) > MAX_DOCUMENT_BYTES for content in objects.values())
    return None if is_long or TOO_MUCH < claimed(objects) < 2**40 else objects


def _hostile_documents(random: Random, objects: Parts) -> None:
    key = random.choice([key for key in objects if _kind_of(key)])
    objects[key] = _hostile_again(random, key, objects[key])


def _hostile_part(random: Random, objects: Parts) -> None:
    """Of the tree, where a restore looks."""
    key = random.choice([key for key in objects if key.startswith("runs/lstm/")])
    try:
        value = msgspec.json.decode(unseal(objects[key], key))
        part = random.choice(["model", "optimizer", "optimizer", "views", "half", "keys"])
        value["tree"] = value["tree"] | mutating.with_hostile_values(random, {part: value["tree"][part]})
        objects[key] = mutating.resealed(random, value, MIN_MANIFEST_BYTES)
    except (errors.CorruptError, msgspec.DecodeError, RecursionError, ValueError, LookupError, TypeError):
        pass  # a fence, or it was made hostile before


def _hostile_manifest(random: Random, objects: Parts) -> None:
    key = random.choice([key for key in objects if key.startswith("runs/")])
    objects[key] = _hostile_again(random, key, objects[key])


def _hostile_again(random: Random, key: str, content: bytes) -> bytes:
    try:
        return hostile_document(random, key, msgspec.json.decode(unseal(content, key)))
    except (errors.CorruptError, msgspec.DecodeError, RecursionError, ValueError):  # it was made hostile before
        return mutating.edited(random, content)


def _hostile_chunk(random: Random, objects: Parts) -> None:
    """With the length that manifests have for it, so that it is looked at; or another."""
    key, other = (random.choice([key for key in objects if key.startswith(("chunks/", "deltas/"))]) for _ in range(2))
    changed = mutating.hostile_chunk(random, objects[key], objects[other])
    if random.random() < 0.5:
        for name, content in list(objects.items()):
            if name.startswith("runs/"):
                objects[name] = _with_stored(random, name, content, key, len(changed))
    objects[key] = changed


def _with_stored(random: Random, name: str, content: bytes, key: str, length: int) -> bytes:
    try:
        value = msgspec.json.decode(unseal(content, name))
        for each in value.get("chunks", ()):
            if f"{each['digest']}.{each['save']}" in key:
                each["stored"] = length
        return mutating.resealed(random, value, MIN_MANIFEST_BYTES if value.get("state") == "committed" else 0)
    except (
        errors.CorruptError,
        msgspec.DecodeError,
        RecursionError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):
        return content  # it was made hostile before


def _edited(random: Random, objects: Parts) -> None:
    key = random.choice(list(objects))
    objects[key] = mutating.edited(random, objects[key], objects[random.choice(list(objects))])


def _gone(random: Random, objects: Parts) -> None:
    if len(objects) > 3:
        del objects[random.choice(list(objects))]


def _exchanged(random: Random, objects: Parts) -> None:
    one, other = random.choice(list(objects)), random.choice(list(objects))
    objects[one], objects[other] = objects[other], objects[one]


def _foreign(random: Random, objects: Parts) -> None:
    """An object under a key that is none of ours, or that no save made."""
    stem = random.choice(["chunks/", "deltas/", "runs/", "runs/lstm/", "sessions/", "condemned/", "", "chunks/aa/"])
    ending = random.choice(
        ["../../etc/passwd", "x", "\x1b[2J", "a" * 300, f"{'a' * 64}.{SAVES[0]}", f"{3:020}.{SAVES[1]}.json"]
    )
    objects[stem + ending] = random.choice([b"", b"x", objects[random.choice(list(objects))]])


_DAMAGES: list[Callable[[Random, Parts], None]] = [
    *[_hostile_documents, _hostile_manifest, _hostile_manifest, _hostile_part, _hostile_part, _hostile_part],
    *[_hostile_chunk, _hostile_chunk, _edited, _edited, _gone, _exchanged, _foreign],
]


def claimed(objects: Parts) -> int:
    """The bytes that reading a store rightly takes: those of a manifest's tensors, and of chunks being decoded."""
    total, longest = 0, 0
    for key, content in objects.items():
        if key.startswith("runs/"):
            with contextlib.suppress(errors.CorruptError, msgspec.DecodeError, RecursionError, ValueError):
                value = msgspec.json.decode(unseal(content, key))
                total = max(total, mutating.claimed_segment_bytes(value))
                chunks = value.get("chunks") if isinstance(value, dict) else None
                for each in chunks if isinstance(chunks, list) else ():
                    raw = each.get("raw") if isinstance(each, dict) else None
                    longest = max(longest, raw if isinstance(raw, int) and raw <= MAX_CHUNK_BYTES else 0)
        elif content[:8] in (chunk.MAGIC, chunk.DELTA_MAGIC) and len(content) >= 24:
            raw = struct.unpack("<Q", content[16:24])[0]
            longest = max(longest, raw if raw <= MAX_CHUNK_BYTES else 0)
    return 4 * total + 8 * longest  # what is exported is copied; several threads decode


def read_store(parts: Parts) -> Watched:
    objects = dict(parts)
    operation = OPERATIONS[objects.pop("operation").decode()]
    name = f"memory://fuzzed-{uuid.uuid4().hex}"
    place = MemoryObjects(name)
    for key, content in objects.items():
        place.put(key, content)
    recording = RecordingObjects(place)
    listed = frozenset(objects)
    try:
        with (
            _scratch_folder() as folder,
            mock.patch.object(target, "open_objects", lambda url, options=None: recording),
        ):
            return watch(
                lambda: operation(recording, folder),
                size=sum(map(len, objects.values())),
                claimed_bytes=claimed(objects),
                folder=str(folder),
                calls=lambda: recording.calls,
                listed=listed,
            )
    finally:
        MemoryFileSystem.store.clear()


_folder: Path | None = None


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[None]:
    """Let exports be written below `folder`."""
    global _folder
    before, _folder = _folder, folder.resolve()
    try:
        yield
    finally:
        _folder = before


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    assert _folder is not None, "within scratch_in only"
    yield _folder
    for file in _folder.iterdir():
        file.unlink()


def _run(objects: RecordingObjects) -> ckptstore.Run:
    return ckptstore.Store(objects, threads=1).run("lstm")


def _restore(**options: Any) -> Callable[[RecordingObjects, Path], Any]:
    def act(objects: RecordingObjects, folder: Path) -> None:
        destination = _state(0)
        destination = {name: destination[name] for name in ("model", "optimizer", "views", "half", "keys")}
        destination["views"] = [torch.zeros(64, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)]
        if any(b'"blocks"' in (objects.inner.get(row.key) or b"") for row in objects.inner.list("runs/lstm/")):
            wanted = {path: torch.zeros_like(tensor) for path, tensor in _joint_state(0).items()}
            destination = {"model": {}, "optimizer": {}, "half": wanted.pop("half"), "keys": {1: ""}}
            for path, tensor in wanted.items():
                part, _, name = path.partition(".")
                destination[part][name] = tensor
        found = _quietly(lambda: _run(objects).restore(destination, **options))
        if found is not None:
            repr(found)

    return act


def _load_boxes(objects: RecordingObjects, folder: Path) -> None:
    """The middle of every tensor, as a process does that has a shard of it."""
    manifest = _run(objects).checkpoint(3)._manifest
    assembly = Assembly(manifest)
    for _, node in tensors(manifest.tree, manifest.segment_bytes):
        at = tuple(size // 3 for size in node.shape)
        sizes = tuple(max(1, size // 2) if size else 0 for size in node.shape)
        if (
            node.tag == "tensor"
            and all(sizes)
            and all(a + b <= c for a, b, c in zip(at, sizes, node.shape, strict=True))
        ):
            assembly.want_box(node, (at, sizes), np.zeros((*sizes, node.item_bytes), np.uint8))
    assembly.fill(objects, 1)


def _notebook(store: ckptstore.Store, folder: Path) -> str | None:
    run = store.run("lstm")
    shown = [store._repr_html_(), run._repr_html_(), *(each._repr_html_() for each in run.checkpoints())]
    return "a notebook shows markup" if any("<script" in each for each in shown) else None


def _api(act: Callable[[ckptstore.Run], Any]) -> Callable[[RecordingObjects, Path], Any]:
    def acted(objects: RecordingObjects, folder: Path) -> None:
        _quietly(lambda: act(_run(objects)))

    return acted


def _of_store(act: Callable[[ckptstore.Store, Path], Any]) -> Callable[[RecordingObjects, Path], Any]:
    def acted(objects: RecordingObjects, folder: Path) -> None:
        _quietly(lambda: act(ckptstore.Store(objects, threads=1), folder))

    return acted


def _quietly(act: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return act()


def _look(checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        read_manifest(checkpoint._manifest)


def _save(objects: RecordingObjects, folder: Path) -> None:
    store = ckptstore.Store(objects, codec="small", threads=1)
    _quietly(lambda: store.run("lstm").save(_state(4), step=4))
    # What was saved into a store that others have spoilt is sound.
    _quietly(lambda: store.run("lstm").load(4))


def _command(*words: str) -> Callable[[RecordingObjects, Path], Any]:
    def act(objects: RecordingObjects, folder: Path) -> str | None:
        told, complaints = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(complaints):
            status = main([word.replace("FOLDER", str(folder)) for word in words])
        if status not in (0, 1, 2, 3, 4):
            return f"{' '.join(words)} ended with {status}: {complaints.getvalue()[-600:]}"
        if "--json" in words:
            json.loads(told.getvalue(), parse_constant=lambda name: _refuse(f"{name} in JSON"))
        acting = {each for each in told.getvalue() + complaints.getvalue() if not each.isprintable()} - {"\n"}
        return f"{' '.join(words)} wrote {sorted(acting)!r:.80}" if acting else None

    return act


def _refuse(why: str) -> None:
    raise ValueError(why)


def _exported(store: ckptstore.Store, file: Path) -> None:
    store.run("lstm").export(file)
    ckptstore.Store(MemoryObjects(f"memory://{new_save_id()}")).run("copy").import_file(file, step=1)


STORE = "/fuzzed/store"
OPERATIONS: dict[str, Callable[[RecordingObjects, Path], Any]] = {
    "load": _api(lambda run: run.load()),
    "load a step": _api(lambda run: run.load(2)),
    "load a part": _api(lambda run: run.load(3, only="model.weight")),
    "restore": _restore(),
    "restore a step": _restore(step=3),
    "restore what fits": _restore(strict=False),
    "latest": _api(lambda run: _look(run.latest())),
    "checkpoint": _api(lambda run: _look(run.checkpoint(1))),
    "checkpoints": _api(lambda run: list(map(_look, run.checkpoints()))),
    "steps": _api(lambda run: run.steps()),
    "delete": _api(lambda run: run.delete(2)),
    "save": _save,
    "runs": _of_store(lambda store, folder: store.runs()),
    "verify": _of_store(lambda store, folder: store.verify()),
    "verify a run": _of_store(lambda store, folder: store.verify("lstm")),
    "usage": _of_store(lambda store, folder: store.usage()),
    "export to safetensors": _of_store(lambda store, folder: _exported(store, folder / "a.safetensors")),
    "export to torch": _of_store(lambda store, folder: _exported(store, folder / "a.pt")),
    "load boxes": _load_boxes,
    "diff": _of_store(lambda store, folder: str(store.diff("lstm@1", "lstm@3"))),
    "diff, all read": _of_store(lambda store, folder: store.diff("lstm@3", "lstm@2", read="all").to_json()),
    "notebook": _of_store(_notebook),
    "ckptstore diff": _command("diff", f"{STORE}/lstm"),
    "ckptstore diff --json": _command("diff", f"{STORE}/lstm@1", "@3", "--json", "--read", "nothing"),
    "ckptstore ls": _command("ls", STORE),
    "ckptstore ls --json": _command("ls", STORE, "--json"),
    "ckptstore ls of a run": _command("ls", f"{STORE}/lstm"),
    "ckptstore ls --json of a run": _command("ls", f"{STORE}/lstm", "--json"),
    "ckptstore show": _command("show", f"{STORE}/lstm@3"),
    "ckptstore show --json": _command("show", f"{STORE}/lstm", "--json"),
    "ckptstore du": _command("du", STORE),
    "ckptstore du --json": _command("du", STORE, "--json"),
    "ckptstore verify": _command("verify", STORE),
    "ckptstore verify --json": _command("verify", STORE, "--json"),
    "ckptstore export": _command("export", f"{STORE}/lstm@3", "FOLDER/b.safetensors"),
    "ckptstore rm": _command("rm", f"{STORE}/lstm@1"),
}


KINDS: dict[str, Kind] = {
    "chunk": Kind(make_chunk, read_chunk, 46),
    "manifest": Kind(_document_maker("manifest"), read_document, 24),
    "marker": Kind(_document_maker("marker"), read_document, 4),
    "session": Kind(_document_maker("session"), read_document, 4),
    "condemned": Kind(_document_maker("condemned"), read_document, 4),
    "store": Kind(make_store, read_store, 12),
}
