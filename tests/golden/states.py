"""The states in the golden stores. Never change one: the stores of old versions hold these for ever."""

from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ckptstore


@dataclass(frozen=True)
class Point:
    """A type of a user's own, registered."""

    x: int
    values: tuple[float, ...]


ckptstore.register(
    Point, "golden.Point", lambda point: {"x": point.x, "values": point.values}, lambda tree: Point(**tree)
)


def version_1() -> dict[str, Any]:
    """One of every kind of leaf and container, and chunks of every kind: bundles, several chunks, zeros, noise."""
    shared = torch.arange(24, dtype=torch.float32)
    noise = np.frombuffer(bytes((number * 197 + number // 256 * 31) % 256 for number in range(9000)), np.uint8)
    ordered = OrderedDict(weight=torch.ones(2, 3), bias=torch.zeros(3))
    ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return {
        "none": None,
        "bools": [True, False],
        "ints": (0, -1, 2**53, -(2**200)),
        "floats": [0.5, -0.0, float("inf"), float("-inf"), float("nan")],
        "complex": complex(1.5, -0.0),
        "texts": ["", "naïve ☃", "\ud800", "$"],
        "bytes": [b"", b"\x00\xff", bytes(range(256)) * 8],
        "keys": {1: "int", "1": "str", (2, None): "tuple", b"b": 0},
        "containers": [
            ordered,
            defaultdict(list, a=[1]),
            Counter("abca"),
            deque([1, 2], maxlen=5),
            {1, 2, 3},
            frozenset({"x"}),
        ],
        "torch_values": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1)],
        "scalars": [np.float32(1.5), np.int64(-7), np.bool_(True), np.str_("text")],
        "registered": Point(3, (0.5, 1.5)),
        "arrays": [
            np.arange(6, dtype=">i4").reshape(2, 3),
            np.array(["ab", "c"]),
            np.array(["2026-01-02"], dtype="datetime64[D]"),
        ],
        "dtypes": {str(dtype).removeprefix("torch."): torch.arange(5).to(dtype) for dtype in DTYPES},
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "scalar_tensor": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "shared": [shared, shared[4:10], shared.view(4, 6)],
        "zeros": torch.zeros(5000),
        "noise": torch.from_numpy(noise.copy()),
        "weights": torch.linspace(-1, 1, 6000),
        "halves": torch.linspace(-1, 1, 3000).bfloat16(),
        "longs": torch.arange(3000),
    }


def version_2() -> dict[str, Any]:
    """What version 1 has, and numbers that move a little between the checkpoints."""
    return {**version_1(), "moving": moving(1)}


def moving(step: int) -> dict[str, torch.Tensor]:
    """Numbers of each width at a step: of equal and of other value, up and down, around zero and the highest bit."""
    dtypes = (torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.float64)
    numbers = torch.arange(6000) * 7919 % 2003 - 1000
    return {str(dtype).removeprefix("torch."): (numbers + step * (numbers % 3 - 1)).to(dtype) for dtype in dtypes}


def version_3() -> dict[str, Any]:
    """What version 2 has; what is new are the first checkpoints, which `PARTS` processes have saved."""
    return version_2()


PARTS = 4


def cut(step: int) -> dict[str, Any]:
    """Tensors that are cut along any dimension, and one whose parts lie in bundles."""
    return {
        "first": torch.linspace(-1, 1, 6000),
        "moving": moving(step),
        "columns": torch.linspace(-1, 1, 40 * 300).reshape(40, 300).bfloat16(),
        "grid": torch.arange(90 * 50, dtype=torch.int32).reshape(90, 50) + step,
        "cube": torch.arange(10 * 11 * 12).reshape(10, 11, 12),
        "short": torch.linspace(0, 1, 901),
    }


def part(state: dict[str, Any], number: int) -> list[tuple[tuple[str, ...], torch.Tensor, tuple[int, ...], Any]]:
    """What a process has of a state: the path, the shard, where it begins, and the shape of the whole tensor."""
    found: list[tuple[tuple[str, ...], torch.Tensor, tuple[int, ...], Any]] = []
    for name, value in state.items():
        if isinstance(value, dict):
            found += [((name, *path), *rest) for path, *rest in part(value, number)]
        elif name == "grid":
            row, column = divmod(number, 2)
            shard = value[45 * row :][:45, 20 * column :][:, : 30 if column else 20]
            found.append(((name,), shard, (45 * row, 20 * column), value.shape))
        else:
            dim = {"columns": 1, "cube": 2}.get(name, 0)
            pieces = value.tensor_split(PARTS, dim)
            start = sum(piece.shape[dim] for piece in pieces[:number])
            at = tuple(start if index == dim else 0 for index in range(value.dim()))
            found.append(((name,), pieces[number], at, value.shape))
    return found


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
