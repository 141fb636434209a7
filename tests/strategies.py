"""Hypothesis strategies for state trees with every type of leaf, and `assert_same`, the strictest comparison of two.

Tensors and floats are made of raw bytes, so every bit pattern occurs (NaNs with payloads too), and tensors are views
of a few common pieces of memory, so that they overlap, are expanded, transposed, empty or have gaps.
"""

import functools
import math
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st

from ckptstore.skeleton import TensorNode
from ckptstore.tree import TORCH_DTYPES, TensorLeaf, flatten, unflatten

with warnings.catch_warnings():
    # torch says once that complex32 is experimental; once it has said so, tests can use it.
    warnings.simplefilter("ignore")
    torch.empty(0, dtype=torch.complex32)

# ---- values


@functools.cache
def texts() -> st.SearchStrategy[str]:
    """Any text: with lone surrogates, and with what means something in a skeleton or in a path."""
    any_character = st.text(st.characters(exclude_categories=()), max_size=8)
    return st.sampled_from(["", "$", "$tensor", "a.b", "a[0]", "_metadata", "state"]) | any_character


@functools.cache
def floats() -> st.SearchStrategy[float]:
    """Any bits of a double."""
    return st.binary(min_size=8, max_size=8).map(_double) | st.floats()


def _double(bits: bytes) -> float:
    return cast(float, struct.unpack(">d", bits)[0])


@functools.cache
def integers() -> st.SearchStrategy[int]:
    """Any int. Those of more than 4300 digits have unit tests: hypothesis could not print them."""
    edges = [2**53 - 1, 2**53, -(2**53), 2**63, 2**64, -(10**300)]
    return st.sampled_from(edges) | st.integers()


@functools.cache
def plain_values() -> st.SearchStrategy[Any]:
    """What can be a dict's key as well as a leaf."""
    complexes = st.builds(complex, floats(), floats())
    return st.none() | st.booleans() | integers() | floats() | complexes | texts() | st.binary(max_size=12)


@functools.cache
def hashables() -> st.SearchStrategy[Any]:
    """Keys of dicts and members of sets: plain values, and tuples and frozensets of them."""
    return st.recursive(
        plain_values(),
        lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
        max_leaves=4,
    )


@functools.cache
def numpy_scalars() -> st.SearchStrategy[Any]:
    """One of each NumPy type that comes back as itself."""
    # Taken out of an array, a text has lost the zeros at its end.
    from_array = numpy_arrays().filter(lambda array: array.size > 0).map(lambda array: array.reshape(-1)[0])
    return from_array | texts().map(np.str_) | st.binary(max_size=5).map(np.bytes_)


@functools.cache
def values() -> st.SearchStrategy[Any]:
    """Leaves that are no tensors and no arrays."""
    return (
        plain_values()
        | numpy_scalars()
        | st.lists(st.integers(0, 2**62), max_size=4).map(torch.Size)
        | st.sampled_from([torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.quint8])
        | st.sampled_from(["cpu", "cuda", "cuda:1", "meta", "mps:0"]).map(torch.device)
    )


# ---- tensors

MEMORY_BYTES = 96
_DTYPES = st.sampled_from(sorted(TORCH_DTYPES.values(), key=str))


@functools.cache
def memories() -> st.SearchStrategy[torch.UntypedStorage]:
    """A piece of memory for tensors to be views of."""
    return st.binary(min_size=MEMORY_BYTES, max_size=MEMORY_BYTES).map(_storage)


def _storage(content: bytes) -> torch.UntypedStorage:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()


@functools.cache
def tensors(memory: st.SearchStrategy[torch.UntypedStorage] | None = None) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of any dtype and layout, in new memory or in one of `memory`."""
    return _tensors_in(memories() if memory is None else memory)


@st.composite
def _tensors_in(draw: st.DrawFn, memory: st.SearchStrategy[torch.UntypedStorage]) -> torch.Tensor:
    dtype = draw(_DTYPES)
    storage = draw(memory)
    if dtype is torch.bool:
        # Only 0 and 1 are bools, so those never share the memory of others.
        storage = _storage(bytes(byte & 1 for byte in storage))
    room = storage.nbytes() // dtype.itemsize
    offset = draw(st.integers(0, room - 1))
    shape: list[int] = []
    stride: list[int] = []
    last = offset
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 4))
        most = 4 if step == 0 else min(4, 1 + (room - 1 - last) // step)
        size = draw(st.integers(0, most))
        last += max(size - 1, 0) * step
        shape.append(size)
        stride.append(step)
    if draw(st.booleans()):
        stride = _row_major(shape)
        shape = shape if offset + math.prod(shape) <= room else []
        stride = stride[: len(shape)]
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    with_gradient = (dtype.is_floating_point or dtype.is_complex) and draw(st.booleans())
    if draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad=with_gradient)
    return tensor.requires_grad_(with_gradient)


def _row_major(shape: Sequence[int]) -> list[int]:
    return [math.prod(max(size, 1) for size in shape[index + 1 :]) for index in range(len(shape))]


# ---- arrays

_FIXED_DTYPES = [
    *("|b1", "|i1", "|u1", "<i2", ">i2", "<u4", ">u4", "<i8", ">u8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"),
    *("<c8", ">c8", "<c16", "<M8[ns]", ">M8[D]", "<M8[25s]", "<m8[ms]", ">m8[ns]", "<m8"),
]


@st.composite
def numpy_arrays(draw: st.DrawFn) -> "np.ndarray[Any, Any]":
    """An array of any dtype, byte order and layout."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = math.prod(shape)
    kind = draw(st.sampled_from(["fixed", "text", "bytes"]))
    if kind == "text":
        items = draw(
            st.lists(st.text(st.characters(exclude_categories=()), max_size=3), min_size=count, max_size=count)
        )
        array = np.array(items, draw(st.sampled_from(["<U3", ">U5"]))).reshape(shape)
    elif kind == "bytes":
        items_of_bytes = draw(st.lists(st.binary(max_size=3), min_size=count, max_size=count))
        array = np.array(items_of_bytes, "|S3").reshape(shape)
    else:
        dtype = np.dtype(draw(st.sampled_from(_FIXED_DTYPES)))
        content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        if dtype.kind == "b":
            content = bytes(byte & 1 for byte in content)
        array = np.frombuffer(bytearray(content), dtype).reshape(shape)
    layout = draw(st.sampled_from(["as it is", "transposed", "reversed", "every second", "broadcast"]))
    if layout == "transposed":
        return array.T
    if layout == "broadcast":
        return np.broadcast_to(array, (2, *shape))
    if layout != "as it is" and shape:
        return array[:: -1 if layout == "reversed" else 2]
    return array


# ---- trees


@functools.cache
def state_trees() -> st.SearchStrategy[Any]:
    """Trees of everything that a checkpoint can hold, dicts with str keys at their root.

    About half of the tensors are views of the same two pieces of memory; trees drawn in one test share these too.
    """
    memory = st.shared(st.tuples(memories(), memories()), key="memory").flatmap(st.sampled_from)
    leaves = _evenly(values(), numpy_arrays(), tensors(), tensors(memory), tensors(memory), _long_bytes())
    return st.dictionaries(texts(), st.recursive(leaves, _containers, max_leaves=6), max_size=5)


def _evenly(*choices: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Each as likely as the others, also those that are many themselves."""
    return st.sampled_from(choices).flatmap(lambda choice: choice)


@functools.cache
def _long_bytes() -> st.SearchStrategy[bytes]:
    """Long enough to be stored in chunks rather than in the manifest."""
    return st.integers(1020, 1030).flatmap(lambda size: st.just(bytes(range(256)) * 5).map(lambda all_: all_[:size]))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    plain = st.dictionaries(texts(), inner, max_size=3)
    mappings = plain | st.dictionaries(hashables(), inner, max_size=3)
    lists = st.lists(inner, max_size=3)
    factories = st.sampled_from([None, bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple])
    return (
        mappings
        | st.builds(_ordered_dict, mappings, st.none() | plain)
        | st.builds(defaultdict, factories, mappings)
        | mappings.map(Counter)
        | lists
        | lists.map(tuple)
        | st.builds(_deque, lists, st.none() | st.integers(0, 3))
        | st.sets(hashables(), max_size=3)
        | st.frozensets(hashables(), max_size=3)
    )


def _ordered_dict(items: dict[Any, Any], metadata: dict[str, Any] | None) -> "OrderedDict[Any, Any]":
    ordered = OrderedDict(items)
    if metadata is not None:
        ordered._metadata = metadata  # type: ignore[attr-defined]
    return ordered


def _deque(items: list[Any], room: int | None) -> "deque[Any]":
    return deque(items, None if room is None else len(items) + room)


# ---- there and back


def through_json(state: Any, **options: Any) -> Any:
    """`state` flattened, written as JSON, read again, and put together with the very tensors that were in it."""
    skeleton, leaves = flatten(state)
    segment_bytes = [_describe(leaf, number) for number, leaf in enumerate(leaves)]

    def supply(node: TensorNode, path: str) -> Any:
        value = leaves[node.segment].value
        return cast("np.ndarray[Any, Any]", value).tobytes() if node.tag == "blob" else value

    return unflatten(msgspec.json.decode(msgspec.json.encode(skeleton)), supply, segment_bytes, **options)


def _describe(leaf: TensorLeaf, segment: int) -> int:
    """Complete the node of a leaf as a contiguous segment of its own; return the segment's length."""
    value = leaf.value
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else value.dtype.str
    node = TensorNode(leaf.node["$"], dtype, tuple(value.shape), segment)
    leaf.node.update(node.to_json())
    return node.span_bytes


# ---- the same


def assert_same(found: Any, wanted: Any) -> None:
    """Fail unless two trees have the same types, order and bits everywhere, and their tensors the same overlaps.

    Of tensors, dtype, shape, device, requires_grad, being a Parameter and every byte are compared; strides only where
    tensors overlap. Of types that are not known here, `==` decides.
    """
    _assert_same(found, wanted, "state")
    _assert_same_overlaps(list(_tensors(found)), list(_tensors(wanted)))


def _assert_same(found: Any, wanted: Any, path: str) -> None:
    assert type(found) is type(wanted), f"{path} is a {type(found)}, not a {type(wanted)}"
    if isinstance(wanted, torch.Tensor):
        for name in ("dtype", "shape", "device", "requires_grad", "layout"):
            assert getattr(found, name) == getattr(wanted, name), f"{path} differs in {name}"
        assert isinstance(found, torch.nn.Parameter) == isinstance(wanted, torch.nn.Parameter), f"{path}: Parameter"
        assert _tensor_bytes(found) == _tensor_bytes(wanted), f"{path} has other bytes"
    elif isinstance(wanted, np.ndarray):
        assert (found.dtype.str, found.shape) == (wanted.dtype.str, wanted.shape), path
        assert found.tobytes() == wanted.tobytes(), f"{path} has other bytes"
    elif isinstance(wanted, dict):
        assert [_bits(key) for key in found] == [_bits(key) for key in wanted], (
            f"{path} has other keys, or another order"
        )
        for key, mine, other in zip(wanted, found.values(), wanted.values(), strict=True):
            _assert_same(mine, other, f"{path}[{_shown(key)}]")
        if isinstance(wanted, defaultdict):
            assert found.default_factory is wanted.default_factory, f"{path} has another default"
        _assert_same(getattr(found, "_metadata", None), getattr(wanted, "_metadata", None), f"{path}._metadata")
    elif isinstance(wanted, list | tuple | deque) and not isinstance(wanted, torch.Size):
        assert len(found) == len(wanted), f"{path} has {len(found)} members, not {len(wanted)}"
        if isinstance(wanted, deque):
            assert found.maxlen == wanted.maxlen, f"{path} has room for {found.maxlen}, not {wanted.maxlen}"
        for index, (mine, other) in enumerate(zip(found, wanted, strict=True)):
            _assert_same(mine, other, f"{path}[{index}]")
    else:
        assert _bits(found) == _bits(wanted), f"{path} is {_shown(found)}, not {_shown(wanted)}"


def _shown(value: Any) -> str:
    """Text for a message; Python does not write very long ints."""
    return hex(value)[:80] if isinstance(value, int) else repr(value)[:80]


def _bits(value: Any) -> Any:
    """Something that is equal for immutable values of one type and the same bits only."""
    if isinstance(value, np.generic):
        exact = bytes(value) if isinstance(value, np.bytes_) else str(value) if isinstance(value, np.str_) else None
        return type(value), value.dtype.str, exact, value.tobytes()
    if isinstance(value, float):
        return type(value), struct.pack(">d", value)
    if isinstance(value, complex):
        return type(value), struct.pack(">dd", value.real, value.imag)
    if isinstance(value, tuple):
        return type(value), [_bits(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted((_bits(item) for item in value), key=repr_of_bits)
    return type(value), value


def repr_of_bits(bits: Any) -> str:
    """An order for what `_bits` returns."""
    kind, *rest = bits
    return f"{kind.__name__} {[hex(item) if type(item) is int else repr(item) for item in rest]}"


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
        yield from _tensors(getattr(tree, "_metadata", None))
    elif isinstance(tree, list | tuple | deque):
        for item in tree:
            yield from _tensors(item)


def _addresses(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Where each element begins in the tensor's storage, in bytes and in row-major order."""
    places = np.full((), tensor.storage_offset(), np.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + np.arange(size) * step
    return places.reshape(-1) * tensor.element_size()


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements in row-major order, read from the storage without torch."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    memory = torch.empty(0, dtype=torch.uint8, device=plain.device).set_(plain.untyped_storage()).cpu().numpy()
    return memory[_addresses(plain)[:, None] + np.arange(plain.element_size())].tobytes()


def _assert_same_overlaps(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for second in range(len(wanted)):
        for first in range(second):
            mine, other = (_overlap(tensors[first], tensors[second]) for tensors in (found, wanted))
            assert mine == other, f"tensors {first} and {second} do not overlap as they did: {mine}, not {other}"


def _overlap(first: torch.Tensor, second: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Where the elements of both lie, from the first element of the first; None if they have no byte in common."""
    if not (first.numel() and second.numel()) or first.device != second.device:
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    touched = [np.unique(_addresses(tensor)[:, None] + np.arange(tensor.element_size())) for tensor in (first, second)]
    if not np.intersect1d(touched[0], touched[1]).size:
        return None
    start = _addresses(first)[0]
    return (_addresses(first) - start).tolist(), (_addresses(second) - start).tolist()


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A shape that is not empty, and boxes that it was cut into, in any order: where each begins, and its sizes."""
    shape = draw(shapes())
    return shape, draw(cuts(shape))


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that are not empty."""
    return st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that an array of `shape` was cut into, in any order."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        at, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        wide = [dimension for dimension, size in enumerate(sizes) if size > 1]
        if not wide:
            boxes.append((at, sizes))
            break
        dimension = draw(st.sampled_from(wide))
        size = draw(st.integers(1, sizes[dimension] - 1))
        below, rest = list(sizes), list(sizes)
        below[dimension], rest[dimension] = size, sizes[dimension] - size
        after = list(at)
        after[dimension] += size
        boxes += [(at, tuple(below)), (tuple(after), tuple(rest))]
    return draw(st.permutations(boxes))
