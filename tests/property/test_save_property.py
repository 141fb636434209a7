"""Any tree of any leaves, saved and loaded through a real store, comes back the same: types, bits, order, sharing."""

import uuid
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

import ckptstore
from ckptstore import chunk
from ckptstore.format import DEFAULT_SMALL_BYTES
from ckptstore.manifest import Marker, encode
from ckptstore.objects.memory import MemoryObjects
from ckptstore.writer import now_text
from tests.strategies import assert_same, state_trees, tensors


def new_run(chunk_bytes: int, small_bytes: int, codec: Any = "fast") -> ckptstore.Run:
    """A run in a store with such sizes, so that small tensors take many chunks, or none is bundled."""
    MemoryFileSystem.store.clear()  # of the examples before: every listing looks at all that is in memory
    place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
    marker = Marker(store=uuid.uuid4().hex, created=now_text(), chunk_bytes=chunk_bytes, small_bytes=small_bytes)
    assert place.create("ckptstore.json", encode(marker))
    return ckptstore.Store(place, codec=codec).run("run")


SIZES = [(2**20, DEFAULT_SMALL_BYTES), (16, 8), (48, 1)]


@given(state=state_trees(), sizes=st.sampled_from(SIZES), in_background=st.booleans())
def test_what_goes_in_comes_out(state: Any, sizes: tuple[int, int], in_background: bool) -> None:
    run = new_run(*sizes)
    saved = run.save_async(state, step=1).result() if in_background else run.save(state, step=1)
    found = run.load()
    assert_same(found, state)
    # Saving what was loaded is the same state: nothing is lost that would show only the second time.
    again = run.save(found, step=2)
    assert again.new_bytes == 0
    assert again._manifest.content == saved._manifest.content


@given(
    first=st.lists(tensors(), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 2**32), min_size=1, max_size=3),
    sizes=st.sampled_from(SIZES),
    codec=st.sampled_from(["none", "fast", "small"]),
)
def test_a_series_of_changing_tensors_comes_out(
    first: list[torch.Tensor], steps: list[int], sizes: tuple[int, int], codec: str
) -> None:
    run = new_run(*sizes, codec)
    states = [[tensor.detach().clone() for tensor in first]]
    for seed in steps:
        states.append([changed(tensor, seed) for tensor in states[-1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk, "DELTA_PAYS", 100.0)  # a delta wherever there is a base
        for number, state in enumerate(states):
            run.save(state, step=number)
    for number, state in enumerate(states):
        assert_same(run.load(number), state)


def changed(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The same dtype and shape with some bytes other than they were."""
    if tensor.dtype is torch.bool:
        return ~tensor
    raw = tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, raw.shape, generator=generator).to(torch.uint8)
    return (raw + steps).view(tensor.dtype).view(tensor.shape)


@given(saved=st.lists(tensors(), min_size=1, max_size=4), data=st.data())
def test_restore_fills_tensors_of_any_layout(saved: list[torch.Tensor], data: Any) -> None:
    """The destination is contiguous, or every second element of larger memory."""
    run = new_run(64, 8)
    run.save(saved, step=1)
    gaps = data.draw(st.lists(st.sampled_from([1, 2]), min_size=len(saved), max_size=len(saved)))
    destination = [zeros(tensor, gap) for tensor, gap in zip(saved, gaps, strict=True)]
    assert run.restore(destination) is not None
    for found, wanted in zip(destination, saved, strict=True):
        assert_same(found, wanted.detach())


def zeros(like: torch.Tensor, gap: int) -> torch.Tensor:
    """A tensor of the same dtype and shape, every `gap`-th element of new memory."""
    memory = torch.zeros(like.numel() * gap * like.element_size(), dtype=torch.uint8)
    return memory.view(like.dtype).view(*like.shape, gap)[..., 0]


@pytest.mark.parametrize("size", [0, 1, 7, 2**16 - 4, 2**16, 2**16 + 4, 2**20 + 12])
def test_sizes_around_those_of_bundles_and_chunks(size: int) -> None:
    run = ckptstore.Store(f"memory://{uuid.uuid4().hex}").run("run")
    state = {"tensor": torch.arange(size, dtype=torch.uint8), "small": torch.ones(3)}
    run.save(state, step=0)
    assert_same(run.load(), state)
