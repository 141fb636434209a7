"""Inputs that atheris makes, guided by which code they reach. It is optional: `pip install atheris`.

The first byte says what the rest is: a chunk, whose checksum is made to fit, or the JSON of a sealed object, whose
seal is. So a bit that is changed is not all that there is to find.
"""

import contextlib
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

CHUNK, DELTA, MANIFEST, OTHER = range(4)


def fuzz(runs: int, seed: int) -> int:
    """Read `runs` inputs. Does not return where one led to an error that is not documented: atheris saves it."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("the guided mode needs a package that is not installed: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["ckptstore"]):
        # Not before: what was imported already is not seen.
        from ckptstore.errors import CheckpointError
        from tests.fuzz import targets

    folder = Path(tempfile.mkdtemp(prefix="ckptstore-fuzz-"))
    for number, content in enumerate(_corpus(targets)):
        (folder / f"{number}").write_bytes(content)

    def one(content: bytes) -> None:
        if content:
            with contextlib.suppress(CheckpointError):
                _read(targets, content[0] % 4, content[1:])

    arguments = [sys.argv[0], str(folder), f"-runs={runs}", f"-seed={seed}", "-max_len=20000", "-timeout=10"]
    atheris.Setup([*arguments, "-rss_limit_mb=6000"], one)
    atheris.Fuzz()
    return 0


def _corpus(targets: Any) -> list[bytes]:
    from tests.fuzz.mutating import json_text

    found = [bytes([DELTA if "base" in parts else CHUNK]) + parts["content"] for parts in targets.valid_chunks()]
    for name, documents in targets.valid_documents().items():
        for _, value in documents[:6]:
            found.append(bytes([MANIFEST if name == "manifest" else OTHER]) + json_text(value))
    return found


def _read(targets: Any, what: int, content: bytes) -> None:
    import numpy as np

    from ckptstore import chunk
    from ckptstore.errors import CheckpointError
    from ckptstore.format import MIN_MANIFEST_BYTES
    from ckptstore.sealed import seal
    from tests.fuzz.mutating import resealed_chunk

    if what in (CHUNK, DELTA):
        changed = resealed_chunk(content)
        length = chunk.raw_length(changed)
        if length > 2**20:
            return
        base = chunk.Base(content[40:72].hex(), np.zeros(length, np.uint8)) if what == DELTA else None
        chunk.decode(changed, None, np.empty(length, np.uint8), base)
        return
    if not content.endswith(b"}") or content.endswith(b"{}"):
        return
    for key, _ in targets.valid_documents()["manifest"][:1] if what == MANIFEST else _one_of_each(targets):
        sealed = seal(content, min_bytes=MIN_MANIFEST_BYTES if what == MANIFEST else 0)
        with contextlib.suppress(CheckpointError):
            targets._READERS[targets._kind_of(key)](sealed, key)


def _one_of_each(targets: Any) -> list[Any]:
    documents = targets.valid_documents()
    return [documents[name][0] for name in ("marker", "session", "condemned")]
