"""Makes the golden store of the present format version: `python -m tests.golden.make`. Done once for each version.

Chunks are small (4096 bytes) so that the store holds tensors of several chunks and stays small itself.
"""

import sys
import uuid
from pathlib import Path

import ckptstore
from ckptstore.format import BLOCK_FORMAT_VERSION, MARKER_KEY
from ckptstore.manifest import Ended, Manifest, Marker, encode
from ckptstore.objects.local import LocalObjects
from ckptstore.writer import now_text
from tests import joint
from tests.golden import states


def make(root: Path) -> None:
    objects = LocalObjects(root)
    marker = Marker(store=uuid.uuid4().hex, created=now_text(), chunk_bytes=4096, small_bytes=1024)
    assert objects.create(MARKER_KEY, encode(marker))
    run = ckptstore.Store(objects, codec="small").run("run_1.a+b=c,d-e")
    state = getattr(states, f"version_{BLOCK_FORMAT_VERSION}")()
    for step in (0, 3):
        cut = states.cut(step)
        joint.save(objects, run.name, step, [states.part(cut, part) for part in range(states.PARTS)], {"note": "cut"})
    run.save(state, step=7, metrics={"loss": 0.25, "bad": float("nan")}, metadata={"note": "golden", "sizes": [1, 2]})
    run.save({"gone": 1}, step=8)
    run.delete(8)
    run.compact(keep_fast=2, depth=1)
    fenced: Manifest = run.checkpoint(7)._manifest
    fence = Ended(state="fenced", run=fenced.run, step=9, save=uuid.uuid4().hex, created=now_text())
    assert objects.create(str(fence.key), encode(fence))


if __name__ == "__main__":
    place = Path(__file__).parent / f"v{BLOCK_FORMAT_VERSION}"
    if place.exists():
        sys.exit(f"{place.name} exists: a golden store is never made again; raise the version first.")
    make(place)
