"""However two checkpoints were cut and written, what a comparison finds is what NumPy finds with both in memory."""

import math
import uuid
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptstore
from ckptstore.format import MARKER_KEY
from ckptstore.manifest import Marker, encode
from ckptstore.objects.open import open_objects
from ckptstore.writer import now_text
from tests import joint
from tests.strategies import cuts, shapes

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex64]
Cut = list[tuple[tuple[int, ...], tuple[int, ...]]]


def store_with(chunk_bytes: int, small_bytes: int) -> ckptstore.Store:
    objects = open_objects(f"memory://{uuid.uuid4().hex}")
    marker = Marker(store=uuid.uuid4().hex, created=now_text(), chunk_bytes=chunk_bytes, small_bytes=small_bytes)
    objects.create(MARKER_KEY, encode(marker))
    return ckptstore.Store(objects, threads=1)


@settings(max_examples=max(50, settings().max_examples // 20))  # each saves two stores and reads them
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from([16, 48, 1000]), st.sampled_from([0, 200]), st.data())
def test_whatever_way_two_tensors_were_cut_what_has_moved_is_found(
    shape: tuple[int, ...], dtype: torch.dtype, chunk_bytes: int, small_bytes: int, data: st.DataObject
) -> None:
    before = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    after = before.clone()
    moved = data.draw(st.sets(st.integers(0, before.numel() - 1), max_size=3))
    for place in moved:
        after.view(-1)[place] += 1
    stores = [store_with(chunk_bytes, small_bytes), store_with(data.draw(st.sampled_from([16, 80])), small_bytes)]
    for store, tensor in zip(stores, (before, after), strict=True):
        _save(store, tensor, data.draw(st.none() | cuts(shape)))
    for read in ("changed", "all"):
        (found,) = stores[0].diff("run", "run", other=stores[1], read=read).tensors
        wide = torch.complex128 if dtype.is_complex else torch.float64
        delta = (after.to(wide) - before.to(wide)).reshape(-1)
        changed = int((after != before).sum())
        assert found.changed == changed / before.numel()
        assert found.largest == pytest.approx(float(delta.abs().max()))
        assert (found.equal_bytes < found.bytes) or not changed
        if found.is_whole and found.cosine is not None:
            old, new = before.to(wide).reshape(-1), after.to(wide).reshape(-1)
            lengths = float(old.norm() * new.norm())
            assert found.cosine == pytest.approx(float(torch.vdot(old, new).real) / lengths if lengths else 1.0)


def _save(store: ckptstore.Store, tensor: torch.Tensor, cut: Cut | None) -> None:
    """As one process does, or as several do of which each has parts of it."""
    if cut is None:
        store.run("run").save({"t": tensor}, step=1)
        return
    parts: list[list[Any]] = [[], []]
    for number, (at, sizes) in enumerate(cut):
        shard = tensor[tuple(slice(start, start + size) for start, size in zip(at, sizes, strict=True))]
        parts[number % 2].append((("t",), shard, at, tuple(tensor.shape)))
    joint.save(store._objects, "run", 1, parts, {"note": 1})
