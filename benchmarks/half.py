"""Weights in bfloat16: what they take, and how fast they are encoded and decoded, beside ZipNN, which is made for them.

The weights are the LSTM's after training, cast. In memory, on as many threads as this machine has cores: chunks of
8 MiB as a save makes them. Ours are hashed as well, which gives a chunk its name, and compared with it when decoded.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.states import LATER_STEPS, STEPS, state_file
from benchmarks.timing import Report, Row, Stopwatch, Took, compared, fresh, in_turn, target, use_kernels
from ckptstore import chunk
from ckptstore.format import DEFAULT_CHUNK_BYTES
from ckptstore.kernels import ByteArray
from ckptstore.pipeline import each, worker_threads

TRAINED = (STEPS, *LATER_STEPS[-2:])
QUESTION = (
    f"bf16: the LSTM's weights after {', '.join(map(str, TRAINED))} steps of one training, cast to bfloat16, in memory"
)
TARGET = 0.68
OURS, OURS_FAST, PEER = "ckptstore", "ckptstore[fast]", "ZipNN"
KERNELS = {OURS: "numpy", OURS_FAST: "numba"}
HOW_TO_INSTALL = "not installed, so not measured: pip install zipnn (it needs a C compiler)"


def ask(folder: Path, rounds: int) -> Report:
    """What weights in bfloat16 take, and how fast they are encoded and decoded, beside ZipNN."""
    files = [str(state_file(folder, steps)) for steps in TRAINED]
    found = {
        name: fresh("benchmarks.half:measure", files=files, rounds=rounds, kernels=kernels)
        for name, kernels in KERNELS.items()
    }
    raw_bytes, sizes = found[OURS]["raw_bytes"], found[OURS]["sizes"]
    rows = [
        Row(f"bytes: {name}", f"{size / raw_bytes:.3f} of {raw_bytes / 1e6:.0f} MB", {"stored": size / raw_bytes})
        for name, size in sizes.items()
    ]
    if PEER not in sizes:
        rows.append(Row(PEER, HOW_TO_INSTALL))
    verdicts = [target("stored / raw is", sizes[OURS] / raw_bytes, at_most=TARGET)]
    base = PEER if PEER in sizes else OURS
    for act in ("encode", "decode"):
        for name in KERNELS:
            for row in compared(found[name][act], base, raw_bytes):
                if row.name == OURS or (row.name == PEER and name == OURS):
                    rows.append(Row(f"{act}: {name if row.name == OURS else PEER}", row.text, row.figures))
                if row.name == OURS and base == PEER:
                    text = f"speed of {act} / that of {PEER}, {name}, is"
                    verdicts.append(target(text, row.figures["speed"], at_least=1.0))
    return Report(QUESTION, rows, "; ".join(verdicts))


def measure(files: list[str], rounds: int, kernels: str) -> dict[str, Any]:
    """In this process, with these kernels of ours: how long each takes, in turn, and what it makes of the weights."""
    use_kernels(kernels)
    raw = _cast_weights(files)
    encoders, decoders, sizes = {}, {}, {}
    for name, found in ((OURS, _ours(raw)), (PEER, _zipnn(raw))):
        if found is not None:
            encoders[name], decoders[name], sizes[name] = found
    measured = {act: in_turn(rounds, variants) for act, variants in (("encode", encoders), ("decode", decoders))}
    return {"raw_bytes": len(raw), "sizes": sizes, **measured}


def _cast_weights(files: list[str]) -> ByteArray:
    tensors = [tensor.to(torch.bfloat16) for file in files for tensor in torch.load(file)["model"].values()]
    return np.concatenate([tensor.contiguous().view(torch.uint8).flatten().numpy() for tensor in tensors])


_Measures = tuple[Callable[[int], Took], Callable[[int], Took], int]
"""Encode, decode, and how many bytes are made."""


def _ours(raw: ByteArray) -> _Measures:
    threads = worker_threads()
    parts = [raw[start : start + DEFAULT_CHUNK_BYTES] for start in range(0, len(raw), DEFAULT_CHUNK_BYTES)]

    def encode(part: ByteArray) -> tuple[str, ByteArray]:
        return chunk.digest(part), chunk.encode(part, 2)

    def decode(known: tuple[ByteArray, str, bytes]) -> None:
        part, name, content = known
        chunk.decode(content, name, np.empty(len(part), np.uint8))

    def timed(work: Callable[[Any], Any], items: list[Any], _: int) -> Took:
        with Stopwatch() as watch:
            each(work, items, threads=threads)
        return watch.took

    made = []
    for part in parts:
        name, content = encode(part)
        made.append((part, name, content.tobytes()))
    size = sum(len(content) for _, _, content in made)
    return partial(timed, encode, parts), partial(timed, decode, made), size


def _zipnn(raw: ByteArray) -> _Measures | None:
    try:
        from zipnn import ZipNN
    except ImportError:
        return None
    zipnn = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=worker_threads())
    content = zipnn.compress(bytearray(raw.tobytes()))
    assert bytes(ZipNN(input_format="byte", threads=worker_threads()).decompress(content)) == raw.tobytes()

    def encode(_: int) -> Took:
        given = bytearray(raw.tobytes())  # it may write to what it is given
        with Stopwatch() as watch:
            zipnn.compress(given)
        return watch.took

    def decode(_: int) -> Took:
        with Stopwatch() as watch:
            zipnn.decompress(content)
        return watch.took

    return encode, decode, len(content)
