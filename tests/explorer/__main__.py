"""`python -m tests.explorer`: every interleaving of two saves, two deletes and two collections, and all mutants.

Prints what was visited and found; the exit status is 1 if a checkpoint was lost, or a guard was not missed.
"""

import argparse
import time

from tests.explorer import scene
from tests.explorer.engine import run_alone

SMALL_SCENES = ("ABPQG", "APGH", "ABPGH")
"""In one of these every mutant shows; they take seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.explorer", description=__doc__)
    parser.add_argument(
        "--actors", default="ABPQGH", help="of A, B (saves), J and K (a joint one), P, Q (deletes), G, H"
    )
    parser.add_argument("--limit", type=int, default=20_000_000, help="visit at most so many states")
    given = parser.parse_args()
    good = True
    for name, loss in scene.GUARDS.items():
        good &= _mutant(name, loss)
    begun = time.monotonic()
    explored = scene.explorer(given.actors)
    found = explored.explore(given.limit)
    seconds = time.monotonic() - begun
    whole = "all" if found.complete else "the first"
    print(f"{given.actors}: {whole} {found.states:,} states, {found.contents:,} contents of a store, {seconds:.0f} s")
    for line in found.lost or ():
        print(line)
    left = sum(bool(scene.leftovers(run_alone(scene.collector("last")(), content))) for content in explored.contents)
    print(f"one collection with everybody else dead leaves garbage in {left} of {len(explored.contents):,} contents")
    print("no checkpoint was lost" if not found.lost else "A CHECKPOINT WAS LOST")
    return 0 if good and not found.lost and not left else 1


def _mutant(name: str, loss: str) -> bool:
    for actors in SMALL_SCENES:
        with scene.guard_taken_out(name):
            found = scene.explorer(actors, name).explore(10_000_000)
        if found.lost:
            print(f"without '{name}': lost after {found.states:,} states of {actors}: {loss}", flush=True)
            return True
    print(f"without '{name}': NOTHING WAS LOST, so this guard is not shown to be needed")
    return False


if __name__ == "__main__":
    raise SystemExit(main())
