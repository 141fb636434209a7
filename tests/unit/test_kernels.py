"""Planes: which byte of an element lands where, that merge is the inverse of split, and that both kernels agree."""

import importlib
import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from ckptstore import kernels
from ckptstore.errors import InvalidInputError
from ckptstore.kernels import PLANE_WIDTHS, ByteArray, compiled, merge, split

SIZES = sorted(PLANE_WIDTHS)
COUNTS = [0, 1, 2, *(kernels._BLOCK_BYTES // 4 + more for more in (-1, 0, 1)), 3 * kernels._BLOCK_BYTES // 4]


@pytest.fixture(params=["with_numpy", "with_numba"], autouse=True)
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module(f"ckptstore.kernels.{request.param}")
    monkeypatch.setattr(compiled, "_used", module)
    return module


def planes_of(raw: ByteArray, element_size: int, base: ByteArray | None = None) -> list[ByteArray]:
    planes = [np.full(len(raw) // element_size * width, 0xEE, np.uint8) for width in PLANE_WIDTHS[element_size]]
    split(raw, element_size, planes, base)
    return planes


def random_bytes(count: int, seed: int = 0) -> ByteArray:
    return np.random.default_rng([count, seed]).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize(
    ("element_size", "planes"),
    [
        (1, ["0001020304050607 08090a0b0c0d0e0f"]),
        (2, ["00020406080a0c0e", "01030507090b0d0f"]),
        (4, ["0001 0405 0809 0c0d", "02060a0e", "03070b0f"]),
        (8, ["00010203 08090a0b", "0405 0c0d", "060e", "070f"]),
    ],
)
def test_the_low_half_comes_first_and_the_high_half_is_halved_again(element_size: int, planes: list[str]) -> None:
    raw = np.arange(16, dtype=np.uint8)
    assert [plane.tobytes() for plane in planes_of(raw, element_size)] == [bytes.fromhex(plane) for plane in planes]


@pytest.mark.parametrize("element_size", SIZES)
def test_small_steps_up_and_down_become_small_numbers(element_size: int) -> None:
    lowest = -(2 ** (8 * element_size - 1))
    steps = [0, -1, 1, -2, 2, -3, lowest, lowest + 1, -lowest - 1]
    numbers = [0, 1, 2, 3, 4, 5, -2 * lowest - 1, -2 * lowest - 3, -2 * lowest - 2]
    base = random_bytes(len(steps) * element_size)
    raw = (base.view(f"<i{element_size}") + np.array(steps, f"<i{element_size}")).view(np.uint8)
    expected = np.array(numbers, f"<u{element_size}").view(np.uint8)
    assert planes_to_bytes(planes_of(raw, element_size, base)) == planes_to_bytes(planes_of(expected, element_size))


def planes_to_bytes(planes: list[ByteArray]) -> list[bytes]:
    return [plane.tobytes() for plane in planes]


@pytest.mark.parametrize("element_size", SIZES)
def test_the_planes_of_an_element_are_as_wide_as_the_element(element_size: int) -> None:
    assert sum(PLANE_WIDTHS[element_size]) == element_size


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("element_size", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_merge_is_the_inverse_of_split_at_every_boundary_of_blocks(
    element_size: int, count: int, with_base: bool
) -> None:
    raw = random_bytes(count * element_size)
    base = random_bytes(count * element_size, seed=1) if with_base else None
    out = np.full(len(raw), 0xEE, np.uint8)
    parts: list[bytes] = []
    merge(planes_of(raw, element_size, base), element_size, out, lambda part: parts.append(part.tobytes()), base)
    assert np.array_equal(out, raw)
    assert b"".join(parts) == raw.tobytes()


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("element_size", SIZES)
def test_split_and_merge_take_memory_at_odd_addresses(element_size: int, with_base: bool) -> None:
    """Views of a file or a bundle begin anywhere."""
    memory = random_bytes(1 + 40 * element_size)
    raw, out = memory[1:], np.zeros(1 + 40 * element_size, np.uint8)[1:]
    base = random_bytes(1 + 40 * element_size, seed=1)[1:] if with_base else None
    planes = [np.empty(1 + 40 * width, np.uint8)[1:] for width in PLANE_WIDTHS[element_size]]
    split(raw, element_size, planes, base)
    merge(planes, element_size, out, base=base)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("element_size", SIZES)
def test_neither_changes_what_it_reads(element_size: int) -> None:
    raw, base = random_bytes(24), random_bytes(24, seed=1)
    raw.flags.writeable = base.flags.writeable = False
    planes = planes_of(raw, element_size, base)
    for plane in planes:
        plane.flags.writeable = False
    merge(planes, element_size, np.empty(24, np.uint8), base=base)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("element_size", SIZES)
def test_both_kernels_write_the_same_bytes(element_size: int, with_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bytes(2 * kernels._BLOCK_BYTES + 8)
    base = random_bytes(len(raw), seed=1) if with_base else None
    ours = planes_to_bytes(planes_of(raw, element_size, base))
    for name in ("with_numpy", "with_numba"):
        monkeypatch.setattr(compiled, "_used", importlib.import_module(f"ckptstore.kernels.{name}"))
        assert planes_to_bytes(planes_of(raw, element_size, base)) == ours


def test_planes_and_bases_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="planes of"):
        split(random_bytes(16), 4, [np.empty(8, np.uint8), np.empty(4, np.uint8), np.empty(3, np.uint8)])
    with pytest.raises(ValueError, match="planes of"):
        merge([np.empty(8, np.uint8), np.empty(4, np.uint8), np.empty(3, np.uint8)], 4, np.empty(16, np.uint8))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        merge([np.empty(8, np.uint8)], 4, np.empty(16, np.uint8))
    with pytest.raises(ValueError, match="a base of"):
        planes_of(random_bytes(16), 4, random_bytes(12))


# ---- which of the two is used


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(compiled, "_used", importlib.import_module("ckptstore.kernels.with_numpy"))
    monkeypatch.setattr(compiled, "_is_decided", False)
    monkeypatch.setattr(compiled, "_expected_bytes", 0)
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    return monkeypatch


def used() -> str:
    name: str = compiled.loaded().__name__
    return name.rpartition(".")[2]


def test_the_compiled_ones_are_loaded_when_there_was_enough_work(undecided: pytest.MonkeyPatch) -> None:
    compiled.expect(compiled.WORTH_BYTES - 1)
    assert used() == "with_numpy"
    compiled.expect(1)
    assert used() == "with_numba"


@pytest.mark.parametrize(("wish", "expected"), [("numba", "with_numba"), ("numpy", "with_numpy")])
def test_an_environment_variable_decides(undecided: pytest.MonkeyPatch, wish: str, expected: str) -> None:
    undecided.setenv(compiled.VARIABLE, wish)
    compiled.expect(1 if wish == "numba" else compiled.WORTH_BYTES)
    assert used() == expected


def test_another_value_of_the_variable_is_refused(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv(compiled.VARIABLE, "cuda")
    with pytest.raises(InvalidInputError, match="CKPTSTORE_KERNELS is 'cuda': set it to numpy or numba"):
        compiled.expect(1)


def test_without_numba_numpy_goes_on_unless_numba_was_asked_for(undecided: pytest.MonkeyPatch) -> None:
    undecided.setitem(sys.modules, "ckptstore.kernels.with_numba", None)
    compiled.expect(compiled.WORTH_BYTES)
    assert used() == "with_numpy"
    undecided.setattr(compiled, "_is_decided", False)
    undecided.setenv(compiled.VARIABLE, "numba")
    with pytest.raises(InvalidInputError, match=r"pip install 'ckptstore\[fast\]'"):
        compiled.expect(1)


def test_a_small_save_does_not_load_numba() -> None:
    code = """
        import sys, torch, ckptstore
        run = ckptstore.Store("memory://small").run("r")
        run.save({"x": torch.ones(100000)}, step=1)
        run.load(1)
        assert "numba" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_that_is_forked_while_numba_is_loaded_does_not_hang(undecided: pytest.MonkeyPatch) -> None:
    code = """
        import os, threading
        from ckptstore.kernels import compiled
        with compiled._lock:  # as a thread that loads Numba does
            child = os.fork()
            if child == 0:
                compiled.expect(1)
                os._exit(0)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


@pytest.mark.parametrize("error", [EOFError("a cache cut off"), OSError(28, "no space left on device")])
def test_a_damaged_cache_of_numba_is_no_reason_to_fail(undecided: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> Any:
        raise error

    undecided.setattr(importlib, "import_module", fail)
    compiled.expect(compiled.WORTH_BYTES)
    assert compiled.loaded().__name__.endswith("with_numpy")
    assert compiled._is_decided
