"""RecordingObjects and FailingObjects: what they remember, and what reaches the store when they break."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptstore.errors import UnavailableError
from ckptstore.objects.base import Objects
from ckptstore.objects.memory import MemoryObjects
from ckptstore.testing import Call, FailingObjects, RecordingObjects


@pytest.fixture
def inner() -> Objects:
    return MemoryObjects(f"memory://{uuid.uuid4().hex}")


def put_three(objects: Objects) -> None:
    for key in ["a", "b", "c"]:
        objects.put(key, b"x")


def keys(objects: Objects) -> list[str]:
    return [row.key for row in objects.list("")]


def test_calls_are_recorded_with_key_and_size(inner: Objects) -> None:
    objects = RecordingObjects(inner)
    objects.create("a", b"12345")
    objects.put("b", memoryview(b"1234").cast("H"))
    objects.get("a")
    objects.get("absent")
    objects.list("a/")
    objects.children("")
    objects.delete("b")
    objects.sync(["a", "b"])
    assert objects.calls == [
        Call("create", "a", 5),
        Call("put", "b", 4),
        Call("get", "a", 5),
        Call("get", "absent"),
        Call("list", "a/"),
        Call("children", ""),
        Call("delete", "b"),
        Call("sync", "a b"),
    ]


def test_results_pass_through_the_recorder(inner: Objects) -> None:
    objects = RecordingObjects(inner)
    assert objects.create("a/b", b"x") is True
    assert objects.create("a/b", b"y") is False
    assert objects.get("a/b") == b"x"
    assert objects.list("") == inner.list("")
    assert objects.children("") == ["a"]
    assert (objects.url, objects.request_threads) == (inner.url, inner.request_threads)


def test_calls_are_counted_by_operation_and_forgotten(inner: Objects) -> None:
    objects = RecordingObjects(inner)
    put_three(objects)
    objects.get("a")
    assert (objects.count(), objects.count("get"), objects.count("get", "put")) == (4, 1, 4)
    assert objects.keys("put") == ["a", "b", "c"]
    objects.clear()
    assert objects.calls == []


def test_a_call_that_fails_is_recorded_too(inner: Objects) -> None:
    objects = RecordingObjects(FailingObjects(inner, fail_at=1))
    with pytest.raises(UnavailableError):
        objects.get("a")
    assert objects.calls == [Call("get", "a")]


def test_calls_of_many_threads_are_all_recorded(inner: Objects) -> None:
    objects = RecordingObjects(inner)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: objects.get(str(number)), range(200)))
    assert sorted(objects.keys("get"), key=int) == [str(number) for number in range(200)]


@pytest.mark.parametrize(("how", "reached"), [("before", ["a"]), ("after", ["a", "b"])])
def test_the_call_fails_before_or_after_it_reached_the_store(inner: Objects, how: str, reached: list[str]) -> None:
    with pytest.raises(UnavailableError):
        put_three(FailingObjects(inner, fail_at=2, how=how))  # type: ignore[arg-type]
    assert keys(inner) == reached


def test_after_one_failure_calls_go_on(inner: Objects) -> None:
    objects = FailingObjects(inner, fail_at=1)
    with pytest.raises(UnavailableError):
        objects.put("a", b"x")
    put_three(objects)
    assert keys(inner) == ["a", "b", "c"]


def test_nothing_of_the_dead_reaches_the_store(inner: Objects) -> None:
    objects = FailingObjects(inner, fail_at=2, error=KeyboardInterrupt, dead=True)
    with pytest.raises(KeyboardInterrupt):
        put_three(objects)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            objects.delete("a")
    assert keys(inner) == ["a"]
    assert objects.call_count == 5


def test_the_error_may_be_made_by_a_function(inner: Objects) -> None:
    objects = FailingObjects(inner, fail_at=1, error=lambda: OSError(28, "full"))
    with pytest.raises(OSError, match="full"):
        objects.list("")


def test_a_walk_ends_when_the_failing_call_never_comes(inner: Objects) -> None:
    walked = []
    for number in range(1, 10):
        objects = FailingObjects(inner, fail_at=number)
        try:
            put_three(objects)
        except UnavailableError:
            walked.append(number)
        if not objects.failed:
            break
    assert walked == [1, 2, 3]
    assert objects.call_count == 3
