"""Whatever way a tensor is cut into parts, what the parts are saved as is the tensor, whole and in any box of it."""

import math
import uuid
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptstore
from ckptstore.assembly import Assembly
from ckptstore.format import MARKER_KEY
from ckptstore.manifest import Marker, encode
from ckptstore.objects.open import open_objects
from ckptstore.skeleton import TensorNode
from ckptstore.writer import now_text
from tests import joint
from tests.strategies import tilings

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128, torch.bool]
Tiling = tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]


def store_with(chunk_bytes: int, small_bytes: int) -> ckptstore.Store:
    objects = open_objects(f"memory://{uuid.uuid4().hex}")
    marker = Marker(store=uuid.uuid4().hex, created=now_text(), chunk_bytes=chunk_bytes, small_bytes=small_bytes)
    objects.create(MARKER_KEY, encode(marker))
    return ckptstore.Store(objects, threads=1)


@settings(max_examples=max(50, settings().max_examples // 20))  # each saves, loads and verifies a store
@given(
    st.lists(tilings(), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([7, 16, 48, 1000]),
    st.sampled_from([0, 20, 200]),
    st.sampled_from([0, 50, 10_000]),
    st.data(),
)
def test_what_parts_have_saved_is_what_they_were_parts_of(
    cuts: list[Tiling], dtype: torch.dtype, chunk_bytes: int, small_bytes: int, carried_bytes: int, data: st.DataObject
) -> None:
    wholes = [torch.arange(math.prod(shape)).reshape(shape).to(dtype) for shape, _ in cuts]
    parts: list[list[Any]] = [[], [], []]
    for number, (whole, (shape, boxes)) in enumerate(zip(wholes, cuts, strict=True)):
        for at, sizes in boxes:
            shard = whole[tuple(slice(start, start + size) for start, size in zip(at, sizes, strict=True))]
            parts[data.draw(st.integers(0, 2))].append(((f"t{number}",), shard, at, shape))
    store = store_with(chunk_bytes, small_bytes)
    names = [f"t{number}" for number in range(len(cuts))]
    saved = joint.save(store._objects, "run", 1, parts, {"note": 1}, carried_bytes=carried_bytes)
    assert saved.format == (3 if any(segment.blocks for segment in saved.segments) else 1)
    found = store.run("run").load()
    for name, whole in zip(names, wholes, strict=True):
        assert found[name].dtype == dtype
        assert torch.equal(found[name], whole)
    assert store.verify().ok

    number = data.draw(st.integers(0, len(cuts) - 1))
    whole = wholes[number]
    at = tuple(data.draw(st.integers(0, size - 1)) for size in whole.shape)
    sizes = tuple(data.draw(st.integers(1, size - start)) for start, size in zip(at, whole.shape, strict=True))
    node = TensorNode.from_json(saved.tree[names[number]], names[number], saved.segment_bytes)
    assembly, into = Assembly(saved), np.zeros((*sizes, node.item_bytes), np.uint8)
    assert assembly.want_box(node, (at, sizes), into)
    assembly.fill(store._objects, 1)
    box = whole[tuple(slice(start, start + size) for start, size in zip(at, sizes, strict=True))]
    assert into.tobytes() == box.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
