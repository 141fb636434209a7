"""Stages on threads: order, bounds, and the first failure that stops the rest."""

import os
import sys
import threading
import time

import pytest

from ckptstore import pipeline
from ckptstore.pipeline import Stage, each, staged


class Broken(BaseException):
    """Not an Exception, as an interrupt is none."""


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * 10

    assert each(slow_first, range(20), threads=4) == [item * 10 for item in range(20)]


def test_each_stage_gets_what_the_one_before_returned() -> None:
    stages = [Stage(lambda item: item + 1, 2), Stage(lambda item: item * 10, 3), Stage(str, 1)]
    assert staged(range(5), stages) == ["10", "20", "30", "40", "50"]


def test_no_items_are_no_work() -> None:
    assert staged([], [Stage(lambda item: item, 2)]) == []


def test_items_under_way_weigh_no_more_than_the_bound() -> None:
    lock = threading.Lock()
    held, most = 0, 0

    def begin(item: int) -> int:
        nonlocal held, most
        with lock:
            held += item
            most = max(most, held)
        return item

    def end(item: int) -> None:
        nonlocal held
        time.sleep(0.001)
        with lock:
            held -= item

    stages = [Stage(begin, 8), Stage(end, 2)]
    staged([3, 4, 5] * 20, stages, weigh=lambda item: item, max_inflight_bytes=10)
    assert 5 < most <= 10


def test_an_item_heavier_than_the_bound_goes_alone() -> None:
    stages = [Stage(lambda item: item, 4)]
    assert staged([100, 1, 100], stages, weigh=lambda item: item, max_inflight_bytes=10) == [100, 1, 100]


@pytest.mark.parametrize("failing_stage", [0, 1])
def test_the_first_failure_reaches_the_caller_and_stops_the_rest(failing_stage: int) -> None:
    seen: list[int] = []

    def work(item: int) -> int:
        seen.append(item)
        return item

    def fail(item: int) -> int:
        if item == 3:
            raise Broken("item 3")
        return item

    stages = [Stage(work, 1), Stage(work, 1)]
    stages[failing_stage] = Stage(fail, 1)
    before = threading.active_count()
    with pytest.raises(Broken, match="item 3"):
        staged(range(10_000), stages, weigh=lambda item: 1, max_inflight_bytes=4)
    assert len(seen) < 100
    assert threading.active_count() == before


def test_done_is_told_of_each_item_one_call_at_a_time() -> None:
    told: list[int] = []
    busy = threading.Lock()

    def done(item: int) -> None:
        assert busy.acquire(blocking=False)
        told.append(item)
        busy.release()

    staged(range(200), [Stage(lambda item: item, 8)], done=done)
    assert sorted(told) == list(range(200))


def test_a_failing_progress_callback_is_a_failure_too() -> None:
    def done(item: int) -> None:
        raise Broken("the bar broke")

    with pytest.raises(Broken, match="the bar broke"):
        staged(range(5), [Stage(lambda item: item, 2)], done=done)


def test_work_beside_is_done_on_another_thread_and_its_result_or_failure_handed_over() -> None:
    here = threading.get_ident()
    assert pipeline.beside(lambda: (threading.get_ident() != here, "done")) == (True, "done")
    with pytest.raises(ZeroDivisionError):
        pipeline.beside(lambda: 1 // 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_work_beside_leaves_the_priority_of_its_caller_as_it_is() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    assert pipeline.beside(priority) > before or before >= 19
    assert priority() == before


def test_a_weight_that_cannot_be_told_is_a_failure_like_any_other_and_nobody_waits_for_ever() -> None:
    def weigh(item: int) -> int:
        raise KeyError(item)

    with pytest.raises(KeyError):
        staged(range(3), [Stage(str, 2), Stage(len, 2)], weigh=weigh)


def test_small_items_are_handed_over_several_at_a_time() -> None:
    arrived = threading.Event()

    def first(item: int) -> None:
        assert item != 1 or not arrived.wait(0.1)

    staged(range(100), [Stage(first, 1), Stage(lambda _: arrived.set(), 1)], weigh=lambda item: 1)


@pytest.mark.parametrize("weight", [None, pipeline.SMALL_BYTES])
def test_a_heavy_item_or_one_of_unknown_weight_is_handed_over_before_the_next_one_is_begun(weight: int | None) -> None:
    arrived = [threading.Event() for _ in range(100)]

    def first(item: int) -> int:
        assert item == 0 or arrived[item - 1].wait(10)
        return item

    weigh = None if weight is None else lambda item: weight
    staged(range(100), [Stage(first, 1), Stage(lambda item: arrived[item].set(), 1)], weigh=weigh)


def test_few_small_items_are_shared_among_all_threads() -> None:
    all_four = threading.Barrier(4, timeout=10)
    staged(range(8), [Stage(lambda item: all_four.wait(), 4)], weigh=lambda item: 1)


def test_a_failure_stops_the_small_items_that_another_thread_has_taken_with_the_first_of_them() -> None:
    begun = threading.Event()
    seen: list[int] = []

    def work(item: int) -> None:
        seen.append(item)
        if item != 0:
            begun.set()
            raise Broken(f"item {item}")
        assert begun.wait(10)
        while sum(thread.name == "ckptstore-stage-0" for thread in threading.enumerate()) > 1:
            time.sleep(0.001)

    with pytest.raises(Broken, match="item 32"):
        staged(range(1000), [Stage(work, 2)], weigh=lambda item: 1)
    assert seen == [0, 32]
