"""Saves and reads through a network that loses, cuts, doubles and delays: never a wrong success, never silent loss.

The proxy of proxy.py stands between the store and a real S3 server. What became of a save is then looked at past it.
"""

import asyncio
import contextlib
import functools
import os
import random
import threading
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.errors import UnavailableError
from ckptstore.objects.obstore import ObstoreObjects
from ckptstore.objects.open import open_objects
from ckptstore.objects.s3 import S3Objects
from tests.fault import proxy as faults
from tests.fault.proxy import Fault, FaultProxy, HoldBack, Throttle
from tests.servers import S3Server

SCALE = float(os.environ.get("CKPTSTORE_TORTURE_SCALE", "1"))
"""Multiplies the number of random schedules: CKPTSTORE_TORTURE_SCALE=50 python -m pytest tests/fault -k schedule"""
SCHEDULES = max(1, round(40 * SCALE))

CLIENTS = {"s3fs": S3Objects, "obstore": ObstoreObjects}
"""They differ in their puts and, without TLS, which the proxy does not speak, in their gets of chunks alone."""

with_both_clients = pytest.mark.parametrize("client", CLIENTS)

NO_RETRIES = {"max_attempts": 0}
"""Of botocore; s3fs tries five times on top of it."""


def state(step: int) -> dict[str, Any]:
    """Two tensors that make chunks of their own, one of which never changes, and a small one."""
    generator = torch.Generator().manual_seed(step)
    return {
        "frozen": torch.arange(40_000, dtype=torch.float32),
        "weight": torch.randn(150, 150, generator=generator),
        "bias": torch.randn(7, generator=generator),
        "step": step,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


@functools.cache
def bucket_of(server: S3Server) -> str:
    """One for all tests: to make a bucket, and a client for it, takes longer than most of them."""
    return server.new_bucket()


class Place:
    """A store at a prefix of its own, reached through the proxy, and past it to look at what is there."""

    def __init__(self, server: S3Server, proxy: FaultProxy, client: str = "s3fs", **config: Any) -> None:
        proxy.heal()
        self.proxy = proxy
        self.url = f"s3://{bucket_of(server)}/{uuid.uuid4().hex}"
        self.objects = open_objects(self.url, server.storage_options)
        self.clean = ckptstore.Store(self.objects)
        endpoint = {**server.storage_options["client_kwargs"], "endpoint_url": proxy.endpoint_url}
        options = {**server.storage_options, "client_kwargs": endpoint, "config_kwargs": {"read_timeout": 1, **config}}
        self.faulty_objects = CLIENTS[client](self.url, options)
        self.run = ckptstore.Store(self.faulty_objects, threads=2).run("run")

    def with_step_1(self) -> "Place":
        """Saved past the faults."""
        self.clean.run("run").save(state(1), step=1)
        return self

    def save(self, step: int = 2) -> ckptstore.Checkpoint:
        """Save through the faults."""
        return self.run.save(state(step), step=step)

    def sessions(self) -> int:
        return len(self.objects.list("sessions/"))

    def manifests(self) -> int:
        return len(self.objects.list("runs/"))

    def check(self, *steps: int) -> None:
        """Past the faults: the store verifies in full, and holds just these steps, each as it was saved."""
        report = self.clean.verify()
        assert report.ok, report.damaged
        run = self.clean.run("run")
        assert run.steps() == list(steps)
        for step in steps:
            assert same(run.load(step), state(step))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ckptstore")]


@pytest.fixture(scope="module")
def moto_proxy(moto_s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto_s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def seaweed_proxy(seaweed_s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed_s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries as often as it always does, and waits a hundredth of the time before it tries again."""
    import botocore.retryhandler
    import s3fs.core

    from ckptstore.objects import obstore, obstore_options, s3

    hurried = types.ModuleType("asyncio")
    vars(hurried).update(vars(asyncio))
    vars(hurried)["sleep"] = lambda seconds: asyncio.sleep(seconds / 100)
    monkeypatch.setattr(s3fs.core, "asyncio", hurried)
    monkeypatch.setattr(s3, "asyncio", hurried)
    monkeypatch.setattr(obstore, "LONGEST_PAUSE", obstore.LONGEST_PAUSE / 100)
    monkeypatch.setattr(obstore_options, "WHOLE_PUT", 1)
    monkeypatch.setattr(botocore.retryhandler, "random", types.SimpleNamespace(random=lambda: random.random() / 100))


@pytest.fixture
def client() -> str:
    """Which client of S3 reaches through the proxy."""
    return "s3fs"


@pytest.fixture
def place(moto_s3: S3Server, moto_proxy: FaultProxy, client: str, short_waits: None) -> Place:
    """A store on moto, with a checkpoint of step 1."""
    return Place(moto_s3, moto_proxy, client).with_step_1()


@pytest.fixture
def impatient(moto_s3: S3Server, moto_proxy: FaultProxy, client: str, short_waits: None) -> Place:
    """The same, with fewer retries: for faults that take a time-out each."""
    return Place(moto_s3, moto_proxy, client, retries=NO_RETRIES).with_step_1()


@pytest.fixture(params=["moto", "seaweed"])
def any_place(request: pytest.FixtureRequest, client: str, short_waits: None) -> Place:
    """The same on both servers, for what matters most."""
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    return Place(server, request.getfixturevalue(f"{request.param}_proxy"), client).with_step_1()


CHUNK, SESSION, MANIFEST = ("put", "chunks/"), ("put", "sessions/"), ("create", "runs/")
RESETS = [faults.reset_before, faults.reset_after]
PUTS = [CHUNK, SESSION, MANIFEST]
READS = [("get", "ckptstore.json"), ("get", "runs/"), ("list", "runs/"), ("list", "chunks/")]
CLOSE = ("delete", "sessions/")

Which = tuple[str, str]


def each(name: str, values: list[Any]) -> pytest.MarkDecorator:
    """Parametrize with readable names."""
    return pytest.mark.parametrize(
        name, values, ids=[getattr(one, "__name__", None) or "-".join(one) for one in values]
    )


# --- Something happens once: the client tries again, and nobody notices. ---


@each("fault", [faults.reset_before, faults.reset_after, faults.garbage, faults.slow_down, faults.internal_error])
@each("which", [*PUTS, *READS, CLOSE])
@with_both_clients
def test_a_save_rides_out_what_happens_once(place: Place, which: Which, fault: Fault) -> None:
    rule = place.proxy.play(fault, *which)
    assert place.save().step == 2
    assert rule.played == 1
    place.check(1, 2)
    assert place.sessions() == 0


@each("which", PUTS)
@with_both_clients
def test_a_save_rides_out_a_put_that_breaks_off_on_its_way(any_place: Place, which: Which) -> None:
    rule = any_place.proxy.play(faults.cut_body, *which)
    assert any_place.save().step == 2
    assert rule.played == 1
    any_place.check(1, 2)
    assert any_place.sessions() == 0


@each("which", READS)
def test_a_save_rides_out_an_answer_that_breaks_off(place: Place, which: Which) -> None:
    rule = place.proxy.play(faults.cut_answer, *which)
    assert place.save().step == 2
    assert rule.played == 1
    place.check(1, 2)


@each("which", [CHUNK, MANIFEST, READS[1]])
@with_both_clients
def test_a_save_rides_out_a_server_that_does_not_answer_once(place: Place, which: Which) -> None:
    rule = place.proxy.play(faults.silence, *which)
    assert place.save().step == 2
    assert rule.played == 1
    place.check(1, 2)


@each("fault", [faults.duplicate, faults.duplicate_telling_the_second])
@each("which", [*PUTS, CLOSE])
@with_both_clients
def test_a_request_that_is_delivered_twice_does_no_harm(any_place: Place, which: Which, fault: Fault) -> None:
    rule = any_place.proxy.play(fault, *which, times=None)
    assert any_place.save().step == 2
    assert rule.played
    any_place.check(1, 2)
    assert any_place.proxy.count("list", "/runs/run/") == 1  # it was not taken for fenced, and done again
    assert any_place.sessions() == 0


@with_both_clients
def test_a_save_rides_out_several_requests_to_slow_down(place: Place) -> None:
    rule = place.proxy.play(faults.slow_down, times=12)
    assert place.save().step == 2
    assert rule.played == 12
    place.check(1, 2)


# --- It goes on for ever: the documented error, and all that was there stays sound. ---


@each(
    "fault",
    [faults.reset_before, faults.reset_after, faults.cut_body, faults.garbage, faults.slow_down, faults.internal_error],
)
@each("which", [CHUNK, SESSION])
@with_both_clients
def test_a_save_that_cannot_put_is_an_error_and_closes_its_session(place: Place, which: Which, fault: Fault) -> None:
    place.proxy.play(fault, *which, times=None)
    with pytest.raises(UnavailableError, match=rf"cannot write s3://.*/{which[1]}"):
        place.save()
    place.check(1)
    assert place.sessions() == 0  # its outcome is known


@each("fault", [faults.reset_before, faults.cut_body, faults.garbage, faults.slow_down, faults.internal_error])
def test_a_save_that_cannot_commit_is_an_error_and_its_session_stands(place: Place, fault: Fault) -> None:
    place.proxy.play(fault, *MANIFEST, times=None)
    with pytest.raises(UnavailableError, match="step 2 of run 'run' was not saved, as far as can be seen now"):
        place.save()
    place.check(1)
    assert place.sessions() == 1  # a create that is still on its way may yet commit it
    place.proxy.heal()
    place.save()
    place.check(1, 2)


@each("fault", [faults.reset_before, faults.garbage, faults.slow_down, faults.internal_error])
@each("which", READS)
def test_a_save_that_cannot_read_is_an_error(place: Place, which: Which, fault: Fault) -> None:
    place.proxy.play(fault, *which, times=None)
    with pytest.raises(UnavailableError, match=r"cannot (read|list) s3://"):
        place.save()
    place.check(1)
    assert place.sessions() == 0


@each("which", PUTS)
@with_both_clients
def test_a_server_that_never_answers_is_an_error_when_the_client_has_waited(impatient: Place, which: Which) -> None:
    impatient.proxy.play(faults.silence, *which, times=None)
    with pytest.raises(UnavailableError, match=r"[Tt]imeout"):
        impatient.save()
    impatient.check(1)


def test_a_save_is_there_although_its_session_cannot_be_closed(place: Place) -> None:
    place.proxy.play(faults.slow_down, *CLOSE, times=None)
    assert place.save().step == 2
    place.check(1, 2)
    assert place.sessions() == 1


# --- The commit. ---
@with_both_clients
def test_a_commit_whose_answers_are_all_lost_is_known_by_reading(any_place: Place) -> None:
    rule = any_place.proxy.play(faults.reset_after, *MANIFEST, times=None)
    assert any_place.save().step == 2
    assert rule.played > 1
    any_place.check(1, 2)
    assert any_place.proxy.count("list", "/runs/run/") == 1  # it was not taken for fenced, and done again
    assert any_place.sessions() == 0


@each("fault", [faults.reset_before, faults.reset_after])
def test_a_commit_of_which_nothing_can_be_learnt_says_so_and_can_be_repeated(any_place: Place, fault: Fault) -> None:
    any_place.proxy.play(fault, *MANIFEST, times=None)
    any_place.proxy.play(faults.reset_before, "get", "runs/run/0*2[.]", times=None)
    with pytest.raises(UnavailableError, match="whether step 2 of run 'run' was saved is not known"):
        any_place.save()
    any_place.check(*([1] if fault is faults.reset_before else [1, 2]))
    assert any_place.sessions() == 1
    any_place.proxy.heal()
    any_place.save()
    any_place.check(1, 2)
    assert any_place.proxy.count(*CHUNK) == 0  # all of it was there already


@pytest.mark.parametrize("lost", ["a reset", "a time-out"])
def test_a_commit_that_arrives_late_finds_its_place_taken_by_the_retry(any_place: Place, lost: str) -> None:
    late = HoldBack(then=faults.Exchange.reset if lost == "a reset" else faults.silence)
    any_place.proxy.play(late, *MANIFEST)
    assert any_place.save().step == 2
    assert late.deliver() == [412]
    any_place.check(1, 2)
    assert any_place.proxy.count("list", "/runs/run/") == 1  # it was not taken for fenced, and done again


def test_a_commit_that_arrives_after_the_save_has_given_up_makes_a_sound_checkpoint(any_place: Place) -> None:
    late = HoldBack(then=faults.Exchange.reset)
    any_place.proxy.play(late, *MANIFEST, times=None)
    with pytest.raises(UnavailableError, match="was not saved, as far as can be seen now"):
        any_place.save()
    any_place.check(1)
    assert any_place.sessions() == 1  # it tells a collector to leave the chunks alone until then
    statuses = late.deliver()
    assert statuses == [200, *[412] * (len(statuses) - 1)]
    any_place.check(1, 2)


def test_a_save_that_was_repeated_and_then_came_late_as_well_stands_once(place: Place) -> None:
    late = HoldBack(then=faults.Exchange.reset)
    place.proxy.play(late, *MANIFEST, times=None)
    with pytest.raises(UnavailableError):
        place.save()
    place.proxy.heal()
    place.save()
    late.deliver()
    place.check(1, 2)
    assert place.manifests() == 3
    place.run.delete(2)
    place.check(1)


def test_a_commit_that_arrives_after_its_step_was_deleted_does_not_bring_it_back(any_place: Place) -> None:
    late = HoldBack(then=faults.Exchange.reset)
    any_place.proxy.play(late, *MANIFEST)
    any_place.save()
    any_place.run.delete(2)
    assert late.deliver() == [412]  # the tombstone keeps the key
    any_place.check(1)


# --- Other puts that arrive late. ---


@each("which", [CHUNK, SESSION])
@with_both_clients
def test_a_put_that_arrives_again_when_the_save_is_over_does_no_harm(any_place: Place, which: Which) -> None:
    late = HoldBack(then=faults.silence)
    any_place.proxy.play(late, *which)
    assert any_place.save().step == 2
    assert late.deliver() == [200]
    any_place.check(1, 2)
    assert any_place.sessions() == (which == SESSION)  # back from the dead, and without a save: it ends by itself


@with_both_clients
def test_a_chunk_that_arrives_after_it_was_deleted_is_garbage_and_no_damage(place: Place) -> None:
    late = HoldBack(then=faults.Exchange.reset)
    place.proxy.play(late, *CHUNK)
    place.save()
    before = {row.key for row in place.objects.list("chunks/")}
    [ghost] = {exchange.request.key.partition("/")[2] for exchange in late.held}
    place.run.delete(2)
    place.objects.delete(ghost)  # as a collector will
    late.deliver()
    assert {row.key for row in place.objects.list("chunks/")} == before
    place.check(1)
    place.save()  # it may take the ghost up: its bytes are good
    place.check(1, 2)


# --- The first save of all, which tries the backend out and makes the store. ---


@each("fault", [faults.reset_before, faults.reset_after, faults.duplicate_telling_the_second, faults.internal_error])
@each("which", [("create", "/scratch/"), ("create", "ckptstore.json"), ("delete", "/scratch/")])
def test_a_first_save_rides_out_what_happens_once(
    moto_s3: S3Server, moto_proxy: FaultProxy, short_waits: None, which: Which, fault: Fault
) -> None:
    place = Place(moto_s3, moto_proxy)
    rule = place.proxy.play(fault, *which)
    place.save(1)
    assert rule.played == 1
    place.check(1)
    assert place.objects.list("scratch/") == []


# --- Reads. ---


def restored(place: Place) -> dict[str, Any] | None:
    """What a restore through the faults puts into a destination; None if it finds no checkpoint."""
    destination = {key: torch.zeros_like(value) for key, value in state(0).items() if isinstance(value, torch.Tensor)}
    found = place.run.restore(destination)
    return None if found is None else {**destination, "step": found.state["step"]}


def ls(place: Place) -> tuple[list[str], list[int], int | None]:
    latest = place.run.latest()
    return ckptstore.Store(place.faulty_objects).runs(), place.run.steps(), latest.step if latest else None


def verified(place: Place) -> tuple[bool, int]:
    report = ckptstore.Store(place.faulty_objects).verify()
    return report.ok, report.checkpoints


READERS: dict[str, Callable[[Place], bool]] = {
    "restore": lambda place: same(restored(place) or {}, state(2)),
    "load": lambda place: same(place.run.load(), state(2)),
    "ls": lambda place: ls(place) == (["run"], [1, 2], 2),
    "verify": lambda place: verified(place) == (True, 2),
}
"""What reads two checkpoints, and whether it was told the truth."""

ONCE = [
    faults.reset_before,
    faults.reset_after,
    faults.cut_answer,
    faults.garbage,
    faults.slow_down,
    faults.internal_error,
    faults.error_page(502),
]
"""What a client that tries again makes up for."""

FALSE_ANSWERS = [faults.shorten_answer, faults.empty_answer, faults.error_page(200), faults.error_page(404)]
"""What looks like an answer, and is none."""


def read_with_a_fault_at_any_request(place: Place, read: Callable[[Place], bool], fault: Fault) -> tuple[int, int]:
    """How many of such reads told the truth, and how many were an error; a third thing fails the test."""
    place.clean.run("run").save(state(2), step=2)
    told = refused = 0
    for nth in range(1, 100):
        place.proxy.heal()
        rule = place.proxy.play(fault, nth=nth)
        try:
            assert read(place), f"request {nth}"
            told += 1
        except UnavailableError:
            refused += 1
        if not rule.played:
            break
    place.check(1, 2)
    assert place.objects.list("condemned/") == []  # no sound chunk was taken for damaged
    return told, refused


@with_both_clients
@pytest.mark.parametrize("reader", READERS)
@each("fault", ONCE)
def test_a_read_rides_out_what_happens_to_any_of_its_requests(place: Place, fault: Fault, reader: str) -> None:
    told, refused = read_with_a_fault_at_any_request(place, READERS[reader], fault)
    assert told > 3 and refused == 0


@with_both_clients
@pytest.mark.parametrize("reader", READERS)
@each("fault", FALSE_ANSWERS)
def test_a_false_answer_to_a_read_is_never_believed(place: Place, fault: Fault, reader: str) -> None:
    told, refused = read_with_a_fault_at_any_request(place, READERS[reader], fault)
    assert told + refused > 3


@with_both_clients
@each("fault", [faults.cut_answer, *FALSE_ANSWERS])
def test_a_restore_from_seaweedfs_never_believes_a_false_answer(any_place: Place, fault: Fault) -> None:
    told, refused = read_with_a_fault_at_any_request(any_place, READERS["restore"], fault)
    assert told + refused > 3


@with_both_clients
@pytest.mark.parametrize("reader", READERS)
@each("fault", [*ONCE, *FALSE_ANSWERS])
def test_a_read_that_goes_wrong_for_ever_is_an_error_and_no_first_start(
    place: Place, fault: Fault, reader: str
) -> None:
    place.proxy.play(fault, times=None)
    with pytest.raises(UnavailableError, match=r"cannot (read|list) s3://.* try again"):
        READERS[reader](place)
    place.check(1)


@each("fault", [faults.cut_answer, faults.shorten_answer, faults.empty_answer, faults.error_page(404)])
def test_no_page_of_a_listing_goes_missing(place: Place, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        place.objects.put(f"pages/{number}", b"x")
    pages = S3Objects._pages
    monkeypatch.setattr(S3Objects, "_pages", lambda self, prefix: pages(self, prefix, MaxKeys=2))
    for nth in (1, 2, 3):
        place.proxy.heal()
        rule = place.proxy.play(fault, "list", nth=nth)
        try:
            rows = place.faulty_objects.list("pages/")
        except UnavailableError:
            continue
        assert [row.key for row in rows] == [f"pages/{number}" for number in range(5)]
        assert rule.played == 1


def test_a_slow_answer_is_waited_for_as_long_as_it_goes_on(place: Place) -> None:
    rule = place.proxy.play(faults.byte_by_byte(0.01), "get", "ckptstore.json")  # longer than the time-out in all
    assert same(restored(place) or {}, state(1))
    assert rule.played == 1


@with_both_clients
@pytest.mark.parametrize("what", ["runs/", "chunks/"])
def test_an_answer_that_stalls_once_is_asked_for_again(place: Place, what: str) -> None:
    rule = place.proxy.play(faults.byte_by_byte(1.5), "get", what)
    assert same(restored(place) or {}, state(1))
    assert rule.played == 1


@with_both_clients
@pytest.mark.parametrize("what", ["runs/", "chunks/"])
def test_answers_that_stall_for_ever_are_an_error(impatient: Place, what: str) -> None:
    impatient.proxy.play(faults.byte_by_byte(1.5), "get", what, times=None)
    with pytest.raises(UnavailableError, match=rf"cannot read s3://.*/{what}.*[Tt]imeout"):
        restored(impatient)


def test_a_get_of_a_server_that_never_answers_is_tried_no_more_often_than_a_put(impatient: Place) -> None:
    impatient.proxy.play(faults.silence, times=None)
    with pytest.raises(UnavailableError, match=r"[Tt]imeout"):
        impatient.faulty_objects.get("key")
    assert impatient.proxy.count("get") == 5
    with pytest.raises(UnavailableError, match=r"[Tt]imeout"):
        impatient.faulty_objects.put("key", b"x")
    assert impatient.proxy.count("put") == 5


# --- Throttling. ---


def test_a_save_goes_slower_when_it_is_told_to_and_succeeds(moto_s3: S3Server, moto_proxy: FaultProxy) -> None:
    # With the waits that clients make in earnest.
    place = Place(moto_s3, moto_proxy).with_step_1()
    throttle = Throttle(limit=4, seconds=1)
    moto_proxy.play(throttle, times=None)
    large = {f"weight {number}": torch.full((20_000,), float(number)) for number in range(32)}
    place.run.save(large, step=2)
    assert throttle.refused > 0
    assert place.clean.verify().ok
    loaded = place.run.load(2)
    assert all(torch.equal(loaded[name], large[name]) for name in large)


# --- Anything at all. ---

SCHEDULED = [
    *RESETS,
    faults.cut_body,
    *ONCE[2:],
    *FALSE_ANSWERS,
    faults.duplicate,
    faults.duplicate_telling_the_second,
]


def schedule(chance: random.Random, proxy: FaultProxy) -> list[HoldBack]:
    """Let a few faults happen to a few requests; returns those that hold requests back."""
    late: list[HoldBack] = []
    for _ in range(chance.randrange(1, 9)):
        fault: Fault = chance.choice(SCHEDULED)
        if chance.random() < 0.15:
            late.append(HoldBack(then=faults.Exchange.reset))
            fault = late[-1]
        which = chance.choice([*PUTS, *READS, CLOSE, ("get", "chunks/"), ("list", ""), ("put", ""), ("create", "")])
        proxy.play(fault, *which, nth=chance.randrange(1, 8), times=chance.choice([1, 1, 1, 2, 4, None]))
    return late


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_any_schedule_of_faults(moto_s3: S3Server, moto_proxy: FaultProxy, short_waits: None, seed: int) -> None:
    chance = random.Random(seed)
    place = Place(moto_s3, moto_proxy, client=list(CLIENTS)[seed % 2])
    late = schedule(chance, moto_proxy)
    saved: set[int] = set()
    for step in (1, 2, 3):
        with contextlib.suppress(UnavailableError):
            place.save(step)
            saved.add(step)
        with contextlib.suppress(UnavailableError):
            found = restored(place)
            assert (found is None and not saved) or (found and found["step"] >= max(saved, default=1))
            assert found is None or same(found, state(found["step"]))
        if chance.random() < 0.5:
            for each_late in late:
                each_late.deliver()
    moto_proxy.heal()
    place.save(4)  # whatever was left behind
    saved.add(4)
    # Before and after what is held back comes.
    for _ in range(2 if late else 1):
        steps = place.clean.run("run").steps()
        assert saved <= set(steps)
        place.check(*steps)
        for each_late in late:
            each_late.deliver()
