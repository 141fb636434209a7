"""Random histories of saves, deletes, collections, repairs and compactions, in any order, some never finished.

The explorer walks every interleaving of a small scene. Here the scenes are larger: several chunks, deltas, steps saved
again, damage that is marked, lists that wait; the interleavings are drawn.
"""

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore import protocol
from ckptstore.format import condemned_key
from ckptstore.manifest import Condemned, Segment, encode, format_naming
from tests.explorer.engine import CHUNK, Content, Steps, atomic, lost_chunk, manifests, perform, run_alone
from tests.explorer.scene import NOW, WRITER, leftovers

DIGESTS = [f"{number:02x}" * 32 for number in range(5)]
RUNS, STEPS = ("a", "b"), (1, 2, 3)
SEEDS = st.integers(0, 2**64 - 1)
"""Of histories: one drawn choice by choice from Hypothesis is more than it likes to keep."""


def save_id(number: int) -> str:
    return f"{number:032x}"


def a_save(draw: random.Random, number: int) -> Callable[[], Steps]:
    """A save of three tensors, each with content that others may share."""
    digests = dict.fromkeys(draw.choices(DIGESTS, k=3))
    names = list(digests)
    chosen = [draw.randrange(len(names)) for _ in range(3)]
    request = protocol.SaveRequest(
        run=draw.choice(RUNS),
        step=draw.choice(STEPS),
        save=save_id(number),
        created=NOW,
        writer=WRITER,
        metrics={},
        metadata={},
        content=f"{number:064x}",
        tree={
            f"t{index}": {"$": "tensor", "dtype": "uint8", "shape": [len(CHUNK)], "segment": index}
            for index in range(3)
        },
        segments=[Segment(bytes=len(CHUNK), element=1, chunks=[index]) for index in chosen],
        chunks=dict.fromkeys(names, len(CHUNK)),
        raw_bytes=3 * len(CHUNK),
        replace=draw.random() < 0.5,
        deltas=draw.random() < 0.5,
    )
    return lambda: protocol.save(request)


def an_actor(draw: random.Random, number: int) -> Callable[[], Steps]:
    kind = draw.random()
    if kind < 0.5:
        return a_save(draw, number)
    if kind < 0.7:
        run, step = draw.choice(RUNS), draw.choice(STEPS)
        return lambda: protocol.delete(run, step, NOW)
    request = protocol.CollectRequest(collection=save_id(number), created=NOW, grace=600.0, wait=draw.random() < 0.3)
    return lambda: protocol.collect(request)


def a_repair(draw: random.Random, number: int, content: Content) -> Callable[[], Steps] | None:
    there = sorted(manifest.key for manifest in manifests(content))
    if not there:
        return None
    request = protocol.RepairRequest(
        manifest=draw.choice(there), sources=tuple(there), save=save_id(number), created=NOW, writer=WRITER
    )
    return lambda: protocol.repair(request)


def a_compaction(draw: random.Random, number: int, content: Content) -> Callable[[], Steps] | None:
    there = sorted(manifests(content), key=lambda manifest: manifest.step)
    if len(there) < 2:
        return None
    older, newer = sorted(draw.sample(range(len(there)), 2))
    everything = [ref.key for manifest in there for ref in manifest.chunks]
    request = protocol.CompactRequest(
        manifest=there[older].key,
        newer=there[newer].key,
        save=save_id(number),
        created=NOW,
        writer=WRITER,
        depth=draw.randint(1, 4),
        pinned=frozenset(draw.sample(everything, draw.randrange(len(everything)))),
    )
    return lambda: protocol.compact(request)


def mark_as_corrupt(draw: random.Random, number: int, content: Content) -> Content:
    """What `verify` does when it finds damage: a list of its own."""
    keys = sorted(key for key, _ in content if key.startswith(("chunks/", "deltas/")))
    if not keys:
        return content
    named = [draw.choice(keys)]
    listed = Condemned(
        format=format_naming(named), collection=save_id(number), reason="corrupt", created=NOW, keys=named
    )
    return content | {(condemned_key(save_id(number)), encode(listed))}


def play(draw: random.Random, steps: int) -> Content:
    """Let actors take turns at random; new ones come, and some are never given a turn again."""
    content: Content = frozenset()
    at_work: list[tuple[Steps, Any]] = []
    for number in range(1, steps):
        if len(at_work) < 4 and draw.random() < 0.3:
            kind = draw.random()
            special = a_repair if kind < 0.2 else a_compaction
            actor = special(draw, number, content) if kind < 0.4 else None
            at_work.append((atomic((actor or an_actor(draw, number))()), None))
        if draw.random() < 0.01:
            content = mark_as_corrupt(draw, number, content)
        if draw.random() < 0.02 and at_work:
            at_work.pop(draw.randrange(len(at_work)))  # killed
        if not at_work:
            continue
        turn = draw.randrange(len(at_work))
        working, answer = at_work[turn]
        try:
            operation = working.send(answer)
        except StopIteration:
            at_work.pop(turn)
            continue
        answer, content = draw.choice(list(perform(operation, content)))
        at_work[turn] = (working, answer)
        assert lost_chunk(content) is None
    return content


# Each example is a history of hundreds of steps.
@settings(max_examples=max(100, settings().max_examples // 4))
@given(SEEDS, st.integers(50, 400))
def test_no_history_loses_a_chunk_of_a_checkpoint(seed: int, steps: int) -> None:
    play(random.Random(seed), steps)


@settings(max_examples=max(100, settings().max_examples // 4))
@given(SEEDS, st.integers(50, 400))
def test_after_any_history_one_collection_leaves_just_what_is_needed(seed: int, steps: int) -> None:
    content = play(random.Random(seed), steps)
    request = protocol.CollectRequest(collection=save_id(10**6), created=NOW, grace=600.0)
    after = run_alone(protocol.collect(request), content)
    assert leftovers(after) == []
    assert {manifest.key for manifest in manifests(after)} <= {manifest.key for manifest in manifests(content)}
    assert current_saves(after) == current_saves(content)


def current_saves(content: Content) -> set[str]:
    """The saves that count: those of committed manifests that no other one of their step replaces."""
    found = manifests(content)
    replaced = {(each.run, each.step, save) for each in found for save in each.replaces}
    return {each.save for each in found if (each.run, each.step, each.save) not in replaced}
