"""What ten checkpoints of one training take, by codec: bytes, seconds to save, seconds to restore.

The same states are saved by each codec into a store of its own. Restores are in fresh processes.
"""

import statistics
from functools import partial
from pathlib import Path

import ckptstore
from benchmarks.save import timed_save
from benchmarks.states import Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Row, Took, fresh, in_turn

CHECKPOINTS = 10
STEPS_APART = 50
CODECS = ("none", "fast", "small")
QUESTION = f"series: {CHECKPOINTS} checkpoints of LSTM and Adam, {STEPS_APART} steps apart, local disk with fsync"


def ask(folder: Path, rounds: int) -> Report:
    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    payload_bytes = raw_bytes(training.state_dicts())
    with work_folder(folder) as work:
        runs = {codec: ckptstore.Store(work / codec, codec=codec).run("lstm") for codec in CODECS}
        saves: dict[str, list[float]] = {codec: [] for codec in CODECS}
        new_bytes = dict.fromkeys(CODECS, 0)
        for number in range(CHECKPOINTS):
            if number:
                training.train(batches, STEPS_APART)
            for codec in CODECS if number % 2 else CODECS[::-1]:
                run = runs[codec]
                saves[codec].append(timed_save(run, training, must_be_new=False)[0])
                new_bytes[codec] += run.checkpoint().new_bytes
        restores = in_turn(rounds, {codec: partial(_restored, work / codec) for codec in CODECS})
    rows = []
    for codec in CODECS:
        save = statistics.median(saves[codec][1:])
        restore = statistics.median(seconds for seconds, _ in restores[codec])
        share = new_bytes[codec] / (CHECKPOINTS * payload_bytes)
        text = f"{share:.3f} of raw  save {save:.3f} s from the second on  restore of the newest {restore:.3f} s"
        rows.append(Row(codec, text, {"stored": share, "save": save, "restore": restore}))
    small = rows[-1].figures["stored"] / rows[1].figures["stored"]
    return Report(QUESTION, rows, f"{CODECS[2]} stores {small:.3f} of the bytes of {CODECS[1]}")


def _restored(store: Path, _: int) -> Took:
    took: Took = fresh("benchmarks.restore:our_restore", store=str(store), kernels="numpy")
    return took
