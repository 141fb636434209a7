"""Chunks that are shared go away while a save that counts on them is under way."""

import os
import random
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import ckptstore
from benchmarks.faults.scenes import NEW, OLD, Fault, Row, our_load, state
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects

TITLE = "The chunks that a save under way counts on are cleaned up"


def run(folder: Path) -> Fault:
    theirs, ours = _restic(folder / "restic"), _ours(folder / "store")
    peer = "restic, `forget --prune` of the only other snapshot"
    return Fault(TITLE, [Row("prune", peer, _text(theirs), _our_text(ours), theirs, ours)])


def can_run() -> bool:
    return shutil.which("restic") is not None


def _text(facts: dict[str, Any]) -> str:
    ways = [
        f"{'pruned' if facts[key] else 'refused'} {when}"
        for key, when in (
            ("pruned_locked", "while the backup holds its lock"),
            ("pruned_unlock", "after `restic unlock`"),
            ("pruned_remove_all", "after `restic unlock --remove-all`"),
        )
    ]
    check = "finds no error" if facts["check"] else "finds errors"
    restored = "is restored" if facts["restored"] else "cannot be restored"
    return f"{', '.join(ways)}; then the backup says that it is saved, `restic check` {check}, and its file {restored}"


def _restic(folder: Path) -> dict[str, Any]:
    """A backup from a pipe is held halfway: by then it has read which chunks there are."""
    folder.mkdir()
    content = random.Random(OLD).randbytes(4 << 20)
    environment = {**os.environ, "HOME": str(folder), "RESTIC_PASSWORD": "peers"}
    restic = ["restic", "--repo", str(folder / "repository"), "--no-cache"]
    backup = ["backup", "--stdin", "--stdin-filename", "state.pt", "--json"]

    def call(*arguments: str, given: bytes = b"") -> bool:
        ended = subprocess.run([*restic, *arguments], env=environment, input=given, capture_output=True, check=False)
        return ended.returncode == 0

    assert call("init")
    assert call(*backup, given=content)
    [first] = (path.name for path in (folder / "repository" / "snapshots").iterdir())
    facts = {}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*restic, *backup], env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(content[: len(content) // 2])
        process.stdin.flush()  # more than a pipe holds: restic reads, so it has loaded its index
        facts["pruned_locked"] = call("forget", "--prune", first)
        assert call("unlock")
        facts["pruned_unlock"] = call("forget", "--prune", first)
        assert call("unlock", "--remove-all")
        facts["pruned_remove_all"] = call("forget", "--prune", first)
        process.stdin.write(content[len(content) // 2 :])
        process.stdin.close()
        said = next((line for line in process.stdout if b'"summary"' in line), b"")
        process.kill()  # it has committed, and would try for a minute to delete the lock that is gone
    assert said, "the backup did not say that it was saved"
    call("unlock", "--remove-all")
    facts["restored"] = (
        call("restore", "latest", "--target", str(folder / "restored"))
        and (folder / "restored" / "state.pt").read_bytes() == content
    )
    return facts | {"check": call("check")}


class Held(RecordingObjects):
    """Puts of chunks wait until they are let go."""

    def __init__(self, place: Path) -> None:
        super().__init__(open_objects(place))
        self.came, self.go = threading.Event(), threading.Event()

    def put(self, key: str, content: Any) -> None:
        if key.startswith("chunks/"):
            self.came.set()
            if not self.go.wait(60):
                raise RuntimeError("nobody let the save go on")
        super().put(key, content)


def _ours(place: Path) -> dict[str, Any]:
    """A save that has found one tensor in an older step is held at the other one.

    Meanwhile the older step is deleted, and the store collected; and again with no grace for saves, by a collector that
    takes this one for dead.
    """
    store = ckptstore.Store(place)
    shared = state(OLD) | {"moment": state(NEW)["moment"]}
    store.run("peers").save(shared, step=OLD)
    held = Held(place)
    pending = ckptstore.Store(held).run("peers").save_async(state(NEW), step=NEW)
    assert held.came.wait(60)
    store.run("peers").delete(OLD)
    beside = store.collect()
    fencing = store.collect(grace=0)
    held.go.set()
    checkpoint = pending.result()
    return {
        "deleted_beside": beside.deleted,
        "fenced": len(fencing.fenced),
        "shared": checkpoint.new_bytes < checkpoint.stored_bytes,
        "load": our_load(store),
        "verified": store.verify().ok,
    }


def _our_text(facts: dict[str, Any]) -> str:
    verified = "finds no damage" if facts["verified"] else "finds damage"
    loaded = f"loading the new step gives {facts['load']}"
    waits = "a collection waits for the save" if not facts["deleted_beside"] else "a collection does not wait"
    fenced = "one told to take it for dead makes it begin again" if facts["fenced"] else "and it is not fenced"
    return f"the older step is deleted; {waits}, {fenced}; `verify` {verified}, {loaded}"
