"""What ten checkpoints of one training take, by codec and by peer: bytes, seconds to save, seconds to restore.

The same states are saved by each into a store of its own. Our restores are in fresh processes, verified and in place;
restic and borg give back the file that torch.load would then have to load.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch

import ckptstore
from benchmarks.peers import Peer, installed
from benchmarks.save import timed_save, timed_torch_save
from benchmarks.states import Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Row, Took, fresh, in_turn
from ckptstore.format import Codec

CHECKPOINTS = 10
CODECS: tuple[Codec, ...] = ("none", "fast", "small")
BASE = "torch.save + fsync"


def ask(folder: Path, rounds: int, steps_apart: int = 50, checkpoints: int = CHECKPOINTS) -> Report:
    """What ten checkpoints take, 50 steps apart, by codec and by peer: bytes, seconds to save and to restore."""
    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    payload_bytes = raw_bytes(training.state_dicts())
    with work_folder(folder) as work:
        runs = {codec: ckptstore.Store(work / codec, codec=codec).run("lstm") for codec in CODECS}
        peers = {peer.name: peer for peer in installed(work)}
        saves: dict[str, list[float]] = {name: [] for name in (*CODECS, *peers, BASE)}
        for number in range(checkpoints):
            if number:
                training.train(batches, steps_apart)
            for name in list(saves) if number % 2 else list(saves)[::-1]:
                if name in runs:
                    took = timed_save(runs[name], training, must_be_new=False)
                elif name in peers:
                    took = peers[name].save(training)
                else:
                    took = timed_torch_save(work / "state.pt", training)
                saves[name].append(took[0])
        stored: dict[str, int] = {name: sum(each.new_bytes for each in run.checkpoints()) for name, run in runs.items()}
        stored |= {name: peer.stored_bytes() for name, peer in peers.items()} | {BASE: checkpoints * payload_bytes}
        restores = in_turn(
            rounds,
            {codec: partial(_restored, work / codec) for codec in CODECS}
            | {name: partial(_given_back, peer, training.step, work / "back") for name, peer in peers.items()},
        )
        torch.save(training.state_dicts(), work / "newest.pt")
        compacted = _compacted(runs["small"], work, rounds)
    rows = []
    for name, seconds in saves.items():
        share = stored[name] / (checkpoints * payload_bytes)
        save = statistics.median(seconds[1:])
        text = f"{share:.3f} of raw  save {save:.3f} s from the second on"
        figures = {"stored": share, "save": save}
        if name in restores:
            figures["restore"] = statistics.median(took for took, _ in restores[name])
            text += f"  restore of the newest {figures['restore']:.3f} s"
        rows.append(Row(name, text, figures))
    rows += compacted
    return Report(
        f"series: {checkpoints} checkpoints of LSTM and Adam, {steps_apart} steps apart, local disk",
        rows,
        "; ".join(
            f"small stores {1 - stored['small'] / stored[name]:.0%} less than {name}" for name in ("fast", *peers)
        ),
    )


def _compacted(run: ckptstore.Run, work: Path, rounds: int) -> list[Row]:
    """The checkpoints but the newest three stored as chains of differences: what it takes, and to restore from them.

    All are compared with torch.load of the newest, in fresh processes, in turn.
    """
    steps = run.steps()
    restores = in_turn(
        rounds,
        {
            BASE: lambda _: fresh("benchmarks.restore:torch_restore", file=str(work / "newest.pt")),
            "newest": partial(_restored, work / "small"),
            "another as saved": partial(_restored, work / "small", step=steps[1]),
        },
    )
    began = time.perf_counter()
    report = run.compact(keep_fast=3)
    seconds = time.perf_counter() - began
    store = ckptstore.Store(work / "small")
    store.collect()
    assert store.verify(quick=True).ok
    after = in_turn(
        rounds,
        {
            BASE: lambda _: fresh("benchmarks.restore:torch_restore", file=str(work / "newest.pt")),
            "compacted, the oldest": partial(_restored, work / "small", step=steps[0]),
            "compacted, the one of most objects": partial(
                _restored, work / "small", step=max(steps, key=partial(_objects, run))
            ),
        },
    )
    raw = sum(checkpoint.raw_bytes for checkpoint in run.checkpoints())
    share = store.usage().stored_bytes / raw
    figures = {"stored": share, "bytes_before": report.bytes_before / raw, "seconds": seconds}
    rows = [Row("small, compacted", f"{share:.3f} of raw  compact {seconds:.1f} s", figures)]
    for measured in (restores, after):
        for name, took in measured.items():
            if name != BASE:
                speeds = [base[0] / ours[0] for base, ours in zip(measured[BASE], took, strict=True)]
                speed = statistics.median(speeds)
                text = f"{speed:.2f} times the speed of torch.load ({min(speeds):.2f}-{max(speeds):.2f})"
                rows.append(Row(f"  restore, {name}", text, {"speed": speed}))
    return rows


def _objects(run: ckptstore.Run, step: int) -> int:
    """How many objects a restore of a checkpoint reads."""
    return len(run.checkpoint(step)._manifest.chunks)


def ask_close(folder: Path, rounds: int) -> Report:
    """The same, 10 steps apart."""
    return ask(folder, rounds, steps_apart=10)


def _restored(store: Path, _: int, step: int | None = None) -> Took:
    took: Took = fresh("benchmarks.restore:our_restore", store=str(store), kernels="numpy", step=step)
    return took


def _given_back(peer: Peer, step: int, into: Path, _: int) -> Took:
    return peer.restore(step, into)
