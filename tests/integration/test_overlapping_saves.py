"""save_async(overlap=…): what an optimizer holds is copied beside the training, and its next step waits for that."""

import copy
import gc
import os
import threading
import uuid
import warnings
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptstore
from ckptstore import background, overlapping, segments
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.tree import flatten
from tests.strategies import assert_same


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


class Training:
    """A model and an optimizer with moments, and copies that are held up until they are let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.BatchNorm1d(50))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.step()
        self.copying, self.go = threading.Event(), threading.Event()
        inner = segments.move

        def held_up(moves: Any, *, threads: int) -> None:
            self.copying.set()
            assert self.go.wait(30)
            inner(moves, threads=threads)

        monkeypatch.setattr(overlapping, "move", held_up)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 50)).square().sum().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def copied(self) -> Any:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def holds_up_after_the_copy(self, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
        """Let copies be made at once; one event tells of that, and the saves wait behind it for the other one."""
        copied, go_on = threading.Event(), threading.Event()
        copy_of = overlapping.Overlap.copy

        def copy_and_wait(overlap: Any, moves: Any, *, threads: int) -> None:
            copy_of(overlap, moves, threads=threads)
            copied.set()
            assert go_on.wait(30)

        monkeypatch.setattr(overlapping.Overlap, "copy", copy_and_wait)
        self.go.set()
        return copied, go_on

    def let_go_soon(self) -> None:
        threading.Timer(0.2, self.go.set).start()


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    return Training(monkeypatch)


def test_what_the_optimizer_holds_is_copied_beside_the_training_and_its_next_step_waits(
    place: Objects, training: Training
) -> None:
    run = ckptstore.Store(place).run("run")
    before = training.copied()
    pending = run.save_async(training.state(), step=1, overlap=training.optimizer)
    assert training.copying.wait(30)
    training.backward()  # which changes what the batch norm remembers, at once
    training.let_go_soon()
    training.optimizer.step()
    assert training.go.is_set()
    pending.result()
    assert_same(run.load(), before)


def test_all_optimizers_that_are_named_wait(place: Objects, training: Training) -> None:
    run = ckptstore.Store(place).run("run")
    other = torch.nn.Linear(3, 3)
    second = torch.optim.SGD(other.parameters(), lr=1.0)
    before = copy.deepcopy(other.state_dict())
    pending = run.save_async({"other": other}, step=1, overlap=[training.optimizer, second])
    other(torch.ones(3)).sum().backward()
    training.let_go_soon()
    second.step()
    assert training.go.is_set()
    pending.result()
    assert_same(run.load(only="other"), before)


def test_a_write_that_is_no_step_fails_the_save_and_nothing_is_committed(place: Objects, training: Training) -> None:
    run = ckptstore.Store(place).run("run")
    pending = run.save_async(training.state(), step=1, overlap=training.optimizer)
    with torch.no_grad():
        next(training.model.parameters()).zero_()
    training.go.set()
    with pytest.raises(ckptstore.InvalidInputError, match="changed while it was copied"):
        pending.result()
    assert run.steps() == []
    training.step()


@pytest.mark.parametrize("then", ["nothing", "a step"])
def test_a_write_that_is_counted_only_after_the_copy_has_ended_fails_the_save(
    place: Objects, training: Training, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    copied, written = training.holds_up_after_the_copy(monkeypatch)
    run = ckptstore.Store(place).run("run")
    pending = run.save_async(training.state(), step=1, overlap=training.optimizer)
    assert copied.wait(30)
    with torch.no_grad():
        next(training.model.parameters()).zero_()  # as if it had begun before: PyTorch counts it at its end
    if then == "a step":
        training.step()
    written.set()
    with pytest.raises(ckptstore.InvalidInputError, match="changed while it was copied"):
        pending.result()
    assert run.steps() == []


def test_a_step_after_the_copy_and_before_the_commit_is_no_other_write(
    place: Objects, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, stepped = training.holds_up_after_the_copy(monkeypatch)
    before = training.copied()
    run = ckptstore.Store(place).run("run")
    pending = run.save_async(training.state(), step=1, overlap=training.optimizer)
    assert copied.wait(30)
    training.step()
    stepped.set()
    pending.result()
    assert_same(run.load(only="optimizer"), before["optimizer"])


def test_steps_go_on_after_a_copy_that_failed(
    place: Objects, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(overlapping, "move", no_memory)
    pending = ckptstore.Store(place).run("run").save_async(training.state(), step=1, overlap=training.optimizer)
    training.step()
    with pytest.raises(MemoryError):
        pending.result()


def test_steps_go_on_if_no_thread_can_be_started(
    place: Objects, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    run = ckptstore.Store(place).run("run")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start"):
            run.save_async(training.state(), step=1, overlap=training.optimizer)
    training.step()


def test_steps_go_on_after_an_interrupt_before_the_thread_is_started(
    place: Objects, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = overlapping._Gate.wait_for

    def interrupted(gate: Any, overlap: Any) -> None:
        inner(gate, overlap)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(overlapping._Gate, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckptstore.Store(place).run("run").save_async(training.state(), step=1, overlap=training.optimizer)
    step = threading.Thread(target=training.step, daemon=True)
    step.start()
    step.join(10)
    assert not step.is_alive()


@pytest.mark.parametrize("when", ["before it copies", "while it copies"])
def test_an_interrupt_after_the_thread_was_started_mixes_no_two_moments(
    place: Objects, training: Training, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    start, copy_of = threading.Thread.start, overlapping.Overlap.copy
    threads: list[threading.Thread] = []
    interrupted = threading.Event()

    def start_and_be_interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("ckptstore-save"):
            threads.append(thread)
            assert when == "before it copies" or training.copying.wait(30)
            raise KeyboardInterrupt

    def late(overlap: Any, moves: Any, *, threads: int) -> None:
        assert when == "while it copies" or interrupted.wait(30)
        copy_of(overlap, moves, threads=threads)

    run = ckptstore.Store(place).run("run")
    before = training.copied()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_be_interrupted)
        patch.setattr(overlapping.Overlap, "copy", late)
        with pytest.raises(KeyboardInterrupt):
            run.save_async(training.state(), step=1, overlap=training.optimizer)
        interrupted.set()
        patch.setattr(threading.Thread, "start", start)
        training.let_go_soon()
        training.step()
        threads[0].join()
    assert when == "before it copies" or run.steps() == [1]
    if run.steps():
        assert_same(run.load(only="optimizer"), before["optimizer"])
    background._under_way.clear()  # what it says at exit, where nobody has asked


def test_an_optimizer_that_was_initialized_once_more_waits_again(place: Objects, training: Training) -> None:
    run = ckptstore.Store(place).run("run")
    training.go.set()
    run.save_async(training.state(), step=1, overlap=training.optimizer).result()
    training.go.clear()
    training.optimizer.__init__(training.model.parameters())  # type: ignore[misc]
    pending = run.save_async(training.state(), step=2, overlap=training.optimizer)
    training.backward()
    training.let_go_soon()
    training.optimizer.step()
    assert training.go.is_set()
    assert pending.result().step == 2


def test_a_value_that_an_optimizer_has_for_all_of_its_parameters_is_no_hindrance(
    place: Objects, training: Training
) -> None:
    training.go.set()
    training.optimizer.state["k"] = torch.tensor([7])  # type: ignore[index]
    run = ckptstore.Store(place).run("run")
    run.save_async({"k": training.optimizer.state["k"]}, step=1, overlap=training.optimizer).result()  # type: ignore[index]
    assert run.load()["k"] == 7


def test_a_forked_process_does_not_wait_for_a_copy_that_only_its_parent_makes(
    place: Objects, training: Training
) -> None:
    pending = ckptstore.Store(place).run("run").save_async(training.state(), step=1, overlap=training.optimizer)
    assert training.copying.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if not child:
        torch.set_num_threads(1)  # those of the parent did not come along
        training.optimizer.step()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    training.go.set()
    pending.result()


def test_saves_that_overlap_do_not_keep_a_model_alive(place: Objects, training: Training) -> None:
    training.go.set()
    pending = ckptstore.Store(place).run("run").save_async(training.state(), step=1, overlap=training.optimizer)
    pending.result()
    gone = weakref.ref(training.optimizer)
    del training.optimizer, training.model
    gc.collect()
    assert gone() is None


def test_parameters_that_have_no_size_yet_are_refused_by_their_path(place: Objects) -> None:
    lazy = torch.nn.LazyLinear(3)
    optimizer = torch.optim.SGD(lazy.parameters(), lr=1.0)
    with pytest.raises(ckptstore.InvalidInputError, match=r"model\.weight"):
        ckptstore.Store(place).run("run").save_async({"model": lazy}, step=1, overlap=optimizer)


@pytest.mark.parametrize(
    "what", [None, "optimizer", 3, [torch.nn.Linear(1, 1)], [None]], ids=["-", "text", "number", "model", "list"]
)
def test_what_cannot_be_waited_for_is_refused(place: Objects, what: Any) -> None:
    run = ckptstore.Store(place).run("run")
    if what is None:
        assert run.save_async({"a": 1}, step=1, overlap=what).result().step == 1
    else:
        with pytest.raises(ckptstore.InvalidInputError, match="overlap must be the optimizer"):
            run.save_async({"a": 1}, step=1, overlap=what)


@settings(max_examples=max(50, settings().max_examples // 20))
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=6), st.integers(0, 30), st.integers(1, 9))
def test_only_bytes_that_optimizers_hold_may_be_copied_later(
    held: list[tuple[int, int]], start: int, length: int
) -> None:
    memory = torch.zeros(40)
    parameters = [torch.nn.Parameter(memory[at : at + size]) for at, size in held]
    overlap = overlapping.Overlap(torch.optim.SGD(parameters, lr=1.0) if parameters else [])
    [source] = segments.find(flatten({"a": memory[start : start + length]})[1])
    theirs = {number for at, size in held for number in range(at, at + size)}
    assert overlap.covers(source) == (theirs >= set(range(start, start + length)))
