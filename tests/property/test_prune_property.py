"""Prunes of random runs by random rules: what a rule asks for stays, and nothing goes but what the report says."""

import uuid
from dataclasses import dataclass
from typing import Any

import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptstore
from ckptstore.condemning import condemn_keys
from ckptstore.objects.memory import MemoryObjects
from ckptstore.retention import Candidate, choose, rules

METRICS = st.fixed_dictionaries(
    {},
    optional={"loss": st.floats() | st.integers(-3, 3), "acc": st.floats(0, 1) | st.booleans() | st.text(max_size=2)},
)
NOW = 1_000.0


@dataclass(frozen=True)
class Step:
    """One checkpoint to be made."""

    step: int
    content: int
    """Equal ones share a chunk."""
    metrics: dict[str, Any]
    tags: frozenset[str]
    damaged: bool


STEPS = st.builds(
    Step,
    step=st.integers(0, 30),
    content=st.integers(0, 2),
    metrics=METRICS,
    tags=st.frozensets(st.sampled_from(["a", "b"]), max_size=2) | st.just(frozenset()),
    damaged=st.sampled_from([False, False, False, True]),
)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "keep_last": st.integers(1, 4),
        "keep_every": st.integers(1, 12),
        "keep_within": st.sampled_from([1e-6, 500, 600.0, "1h"]),
        "keep_best": st.sampled_from(["loss", "loss:max", ("loss:min", "acc:max")]),
        "keep_tags": st.sampled_from(["a", ("a", "c")]),
    },
).filter(bool)


def runs_of(max_size: int) -> st.SearchStrategy[list[Step]]:
    found = st.lists(STEPS, min_size=1, max_size=max_size, unique_by=lambda each: each.step)
    return found.map(lambda steps: sorted(steps, key=lambda each: each.step))


def asked(given: dict[str, Any]) -> Any:
    none: dict[str, Any] = dict.fromkeys(("keep_last", "keep_every", "keep_within", "keep_best", "keep_tags"))
    return rules(**(none | given))


def numbers(steps: list[Step], metric: str) -> dict[int, float]:
    """What of a metric can be compared."""
    return {
        each.step: each.metrics[metric]
        for each in steps
        if not each.damaged and type(each.metrics.get(metric)) in (int, float)
        if each.metrics[metric] == each.metrics[metric]
    }


def wanted(steps: list[Step], given: dict[str, Any]) -> set[int]:
    """What must stay, said once more in other words; times aside. Raises LookupError for a metric that none has."""
    sound = [each.step for each in steps if not each.damaged]
    stay = {each.step for each in steps if each.damaged or each.tags} | set(sound[-1:])
    if last := given.get("keep_last"):
        stay |= set(sound[-last:])
    if every := given.get("keep_every"):
        stay |= {min(step for step in sound if step // every == interval) for interval in {s // every for s in sound}}
    best = given.get("keep_best", ())
    for each in (best,) if isinstance(best, str) else best:
        metric, _, order = each.partition(":")
        values = numbers(steps, metric)
        if sound and not values:
            raise LookupError(metric)
        if sound:
            value = max(values.values()) if order == "max" else min(values.values())
            stay.add(max(step for step in values if values[step] == value))
    return stay


@settings(max_examples=max(100, settings().max_examples // 4))
@given(steps=runs_of(12), given_rules=RULES, ages=st.lists(st.floats(0, 1000), min_size=12, max_size=12))
def test_just_what_a_rule_asks_for_stays(steps: list[Step], given_rules: dict[str, Any], ages: list[float]) -> None:
    candidates = [
        Candidate(each.step, NOW - age, each.metrics, tuple(sorted(each.tags)), each.damaged)
        for each, age in zip(steps, ages, strict=False)
    ]
    try:
        expected = wanted(steps, given_rules)
    except LookupError:
        expected = None
    try:
        reasons = choose(candidates, asked(given_rules), NOW)
    except ckptstore.InvalidInputError:
        assert expected is None
        return
    assert expected is not None
    within = asked(given_rules).within
    if within is not None:
        expected |= {each.step for each in candidates if not each.damaged and each.modified >= NOW - within}
    assert {step for step, why in reasons.items() if why} == expected
    assert list(reasons) == [each.step for each in steps]


@settings(max_examples=max(100, settings().max_examples // 4))
@given(steps=runs_of(12), given_rules=RULES)
def test_what_a_prune_leaves_it_leaves_again(steps: list[Step], given_rules: dict[str, Any]) -> None:
    candidates = [Candidate(each.step, NOW, each.metrics, tuple(each.tags), each.damaged) for each in steps]
    try:
        first = choose(candidates, asked(given_rules), NOW)
    except ckptstore.InvalidInputError:
        return
    left = [each for each in candidates if first[each.step]]
    assert choose(left, asked(given_rules), NOW) == {each.step: first[each.step] for each in left}


def state(content: int) -> dict[str, torch.Tensor]:
    return {"t": torch.full((4,), float(content))}


def content_of(objects: MemoryObjects) -> dict[str, bytes | None]:
    return {row.key: objects.get(row.key) for row in objects.list("")}


@settings(max_examples=max(20, settings().max_examples // 10))  # each makes, prunes, collects and verifies a store
@given(steps=runs_of(4), other=runs_of(2), given_rules=RULES)
def test_a_store_after_a_prune_and_a_collection(
    steps: list[Step], other: list[Step], given_rules: dict[str, Any]
) -> None:
    MemoryFileSystem.store.clear()
    objects = MemoryObjects(f"memory://{uuid.uuid4().hex}")
    store = ckptstore.Store(objects, threads=1)
    for run, made in (("run", steps), ("other", other)):
        for each in made:
            # What is damaged has a chunk of its own, so that no other is.
            saved = state(100 + each.step) if each.damaged else state(each.content)
            store.run(run).save(saved | {"run": run}, step=each.step, metrics=each.metrics)
            for tag in each.tags:
                store.run(run).tag(each.step, tag)
            if each.damaged:
                assert condemn_keys(objects, [ref.key for ref in store.run(run).checkpoint(each.step)._manifest.chunks])
    before = content_of(objects)
    try:
        planned = store.prune("run", **given_rules, dry_run=True)
    except ckptstore.InvalidInputError:
        try:
            store.prune("run", **given_rules)
        except ckptstore.InvalidInputError:
            assert content_of(objects) == before
            return
        raise AssertionError("the dry run was refused, and the prune was not") from None
    assert content_of(objects) == before
    done = store.prune("run", **given_rules)
    assert (planned.kept, planned.removed, planned.freed_bytes) == (done.kept, done.removed, done.freed_bytes)
    kept, removed = [row.step for row in done.kept], [row.step for row in done.removed]
    assert sorted([*kept, *removed]) == [each.step for each in steps]
    assert store.run("run").steps() == kept
    assert store.run("other").steps() == [each.step for each in other]
    assert wanted(steps, given_rules) <= set(kept)
    after = content_of(objects)
    changed = {key for key in before if after.get(key) != before[key]}
    assert {int(key.split("/")[2].partition(".")[0]) for key in changed} == set(removed)
    assert all(key.startswith("runs/run/") for key in changed) and set(after) == set(before)
    again = store.prune("run", **given_rules)
    assert ([row.step for row in again.kept], again.removed) == (kept, [])
    assert content_of(objects) == after
    store.collect()
    for each in steps:
        if each.step in kept:
            expected = state(100 + each.step) if each.damaged else state(each.content)
            assert torch.equal(store.run("run").load(each.step)["t"], expected["t"])
    assert store.verify().damaged == []
