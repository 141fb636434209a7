"""How long a save takes of a fine-tune, nine tenths of whose weights are frozen, compared with torch.save and fsync.

What torch.save writes each time, ckptstore finds: it hashes all of the state, and uploads the part that changes.
"""

from pathlib import Path

import torch
from torch import nn

import ckptstore
from benchmarks.save import BASE, fsync
from benchmarks.states import raw_bytes, work_folder
from benchmarks.timing import Report, Stopwatch, Took, compared, in_turn, target

LAYERS, WIDTH = 10, 1500
QUESTION = f"fine-tune: {LAYERS} layers of {WIDTH}², the last of which trains with Adam, local disk with fsync"
OURS = "ckptstore"
TARGET = 4.0


def ask(folder: Path, rounds: int) -> Report:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    layers[:-1].requires_grad_(False)
    optimizer = torch.optim.Adam(layers[-1].parameters())

    def train() -> None:
        inputs = torch.randn(16, WIDTH)
        hidden = inputs
        for layer in layers:
            hidden = torch.tanh(layer(hidden))
        optimizer.zero_grad()
        (hidden - inputs).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def state_dicts() -> dict[str, object]:
        return {"model": layers.state_dict(), "optimizer": optimizer.state_dict()}

    with work_folder(folder) as work:
        run = ckptstore.Store(work / "store").run("tuned")
        train()
        run.save({"model": layers, "optimizer": optimizer}, step=0)

        def ours(number: int) -> Took:
            train()
            with Stopwatch() as watch:
                run.save({"model": layers, "optimizer": optimizer}, step=number + 2)
            return watch.took

        def theirs(number: int) -> Took:
            train()
            file = work / f"{number}.pt"
            with Stopwatch() as watch:
                torch.save(state_dicts(), file)
                for path in (file, file.parent):
                    fsync(path)
            file.unlink()
            return watch.took

        measured = in_turn(rounds, {OURS: ours, BASE: theirs})
    rows = compared(measured, BASE, raw_bytes(state_dicts()))
    return Report(QUESTION, rows, target(f"speed / that of {BASE} is", rows[0].figures["speed"], at_least=TARGET))
