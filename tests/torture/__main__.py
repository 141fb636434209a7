"""`python -m tests.torture`: the long tortures, each with a line of figures; the exit status is 1 if anything was lost.

On a local disk, and on SeaweedFS, a real S3 server that is started for it.
"""

import argparse
import tempfile
from pathlib import Path

from tests.servers import running_seaweed
from tests.torture.jobs import Outcome, Place
from tests.torture.runs import kill_again_and_again, stress


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="on the local disk; a sixth of it on S3")
    parser.add_argument("--seconds", type=float, default=60, help="of each stress run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-s3", action="store_true", help="only on the local disk")
    given = parser.parse_args()
    outcomes: list[Outcome] = []

    def told(outcome: Outcome) -> None:
        print(outcome, flush=True)
        outcomes.append(outcome)

    with tempfile.TemporaryDirectory(prefix="ckptstore-torture-") as name:
        folders = [Path(name, text) for text in ("kill", "stress", "kill-s3", "stress-s3")]
        for folder in folders:
            folder.mkdir()
        here = [Place(str(folder / "store")) for folder in folders[:2]]
        told(kill_again_and_again(here[0], folders[0], kills=given.kills, seed=given.seed, name="kill, disk"))
        told(stress(here[1], folders[1], seconds=given.seconds, seed=given.seed, name="stress, disk"))
        if not given.no_s3:
            with running_seaweed() as server:
                there = [Place(f"s3://{server.new_bucket()}/store", server.storage_options) for _ in range(2)]
                kills = max(1, given.kills // 6)
                told(kill_again_and_again(there[0], folders[2], kills=kills, seed=given.seed, name="kill, S3"))
                told(stress(there[1], folders[3], seconds=given.seconds, seed=given.seed, name="stress, S3"))
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
