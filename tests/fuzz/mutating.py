"""Valid objects made hostile: bytes that were changed, and JSON whose values were, under a seal that is right."""

import copy
import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import blake3
import msgspec
import zstandard

from ckptstore import chunk
from ckptstore.kernels import PLANE_WIDTHS
from ckptstore.sealed import seal

SAVES = [32 * digit for digit in "abc0"]

MAX_REPEATED_BYTES = 10_000
"""An input that is longer takes its time because it is long."""

NUMBERS = [
    *(0, 1, 2, 3, 4, 7, 8, 63, 64, 65, 100, 101, 255, 256, 1023, 1024, 1025),
    *(2**16, 2**24, 2**30 - 1, 2**30, 2**30 + 1, 2**31, 2**32, 2**48, 2**48 + 1, 2**53, 2**61 - 1, 2**62, 2**62 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**100, 10**400),
    *(-1, -2, -(2**31), -(2**63), -(2**63) - 1, -(10**400)),
]


# ---- bytes


def edited(random: Random, content: bytes, other: bytes = b"") -> bytes:
    """`content` after one to three edits: bits flipped, cut out, cut off, put in, repeated, or spliced with another."""
    for _ in range(random.choice([1, 1, 2, 3])):
        edit: Callable[[Random, bytes, bytes], bytes] = random.choice(_EDITS)
        content = edit(random, content, other)
    return content


def _flipped(random: Random, content: bytes, other: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        if changed:
            changed[_place(random, len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _overwritten(random: Random, content: bytes, other: bytes) -> bytes:
    at, width = _place(random, len(content) + 1), random.choice([1, 2, 4, 8])
    number = random.choice(NUMBERS) % 2 ** (8 * width)
    return bytes(content[:at] + number.to_bytes(width, "little") + content[at + width :])


def _cut(random: Random, content: bytes, other: bytes) -> bytes:
    at = _place(random, len(content) + 1)
    return random.choice([content[:at], content[at:], content[:at] + content[at + random.randrange(1, 40) :]])


def _put_in(random: Random, content: bytes, other: bytes) -> bytes:
    at = _place(random, len(content) + 1)
    return content[:at] + random.randbytes(random.choice([1, 8, 64])) + content[at:]


def _repeated(random: Random, content: bytes, other: bytes) -> bytes:
    at = _place(random, len(content) + 1)
    part = content[at : at + random.randrange(1, 200)]
    return content[:at] + part * random.choice([2, 3, 100]) + content[at:]


def _spliced(random: Random, content: bytes, other: bytes) -> bytes:
    return content[: _place(random, len(content) + 1)] + other[_place(random, len(other) + 1) :]


_EDITS: list[Callable[[Random, bytes, bytes], bytes]] = [
    *(_flipped, _flipped, _overwritten, _overwritten),
    *(_cut, _put_in, _repeated, _spliced),
]


def _place(random: Random, length: int) -> int:
    """Often near the beginning, where headers are."""
    return random.randrange(min(length, random.choice([120, length, length])) or 1)


# ---- chunks

_FIELDS = {
    "version": (8, 1),
    "filter": (9, 1),
    "element": (10, 1),
    "planes": (11, 1),
    "reserved": (12, 4),
    "raw": (16, 8),
}


def resealed_chunk(content: bytes) -> bytes:
    """The object with the checksum that fits what else it says, as far as its table can be made out."""
    if len(content) < 40:
        return content
    table = 72 if content[:8] == chunk.DELTA_MAGIC else 40
    count = content[11]
    start = table + 16 * count
    planes, position = b"", start
    for index in range(count):
        entry = content[table + 16 * index : table + 16 * (index + 1)]
        if len(entry) < 16:
            break
        mode, stored = entry[0], struct.unpack("<Q", entry[8:])[0]
        part = content[position : position + stored]
        planes += part if mode == 1 else b""
        position += len(part)
    checksum = blake3.blake3(content[:24] + bytes(16) + content[40:start] + planes).digest(16)
    return content[:24] + checksum + content[40:]


def hostile_chunk(random: Random, content: bytes, other: bytes = b"") -> bytes:
    """A chunk or delta with a hostile header, table or plane, whose checksum fits in most cases."""
    choice = random.randrange(4)
    if choice == 0 or len(content) < 88:
        changed = edited(random, content, other)
    elif choice == 1:
        at, width = random.choice(list(_FIELDS.values()))
        number = random.choice([*NUMBERS, *PLANE_WIDTHS]) % 2 ** (8 * width)
        changed = content[:at] + number.to_bytes(width, "little") + content[at + width :]
    elif choice == 2:
        table = 72 if content[:8] == chunk.DELTA_MAGIC else 40
        at = table + 16 * random.randrange(max(1, min(content[11], 4)))
        entry = struct.pack("<B7xQ", random.choice([0, 1, 2, 2, 3, 255]), random.choice(NUMBERS) % 2**64)
        changed = content[:at] + random.choice([entry, entry[:1] + content[at + 1 : at + 16]]) + content[at + 16 :]
    else:
        changed = _with_hostile_frame(random, content)
    return resealed_chunk(changed) if random.random() < 0.85 else changed


def _with_hostile_frame(random: Random, content: bytes) -> bytes:
    """All planes taken out, and one zstd frame that lies put in the place of the first."""
    table = 72 if content[:8] == chunk.DELTA_MAGIC else 40
    length = struct.unpack("<Q", content[16:24])[0] % 2**20
    frame = random.choice(_FRAMES)(random, length)
    count = min(content[11], 8)
    entries = [struct.pack("<B7xQ", 1, len(frame))] + [struct.pack("<B7xQ", 2, 0)] * (count - 1)
    return content[:table] + b"".join(entries) + frame


def _frame_of_other_length(random: Random, length: int) -> bytes:
    return zstandard.compress(bytes(random.choice([0, length, length + 1, 2 * length, 2**20])))


def _frame_with_forged_header(random: Random, length: int) -> bytes:
    """A frame that says it holds `length` bytes in a window of any size, and holds others."""
    descriptor = 0b11000000 | random.choice([0, 0b100000, 0b100, 0b1, 0b11])
    window = b"" if descriptor & 0b100000 else bytes([random.choice([0, 0x50, 0x98, 0xF8, 0xFF])])
    dictionary = random.randbytes({0: 0, 1: 1, 2: 2, 3: 4}[descriptor & 3])
    content_size = struct.pack("<Q", random.choice([length, length, random.choice(NUMBERS) % 2**64]))
    kind, size = random.choice([0, 1, 2, 3]), random.choice([0, 1, length % 2**21, 2**17, 2**21 - 1])
    block = ((size << 3) | (kind << 1) | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + window + dictionary + content_size + block + random.randbytes(8)


def _broken_frame(random: Random, length: int) -> bytes:
    return edited(random, zstandard.compress(random.randbytes(7) * (length // 7 + 1))[: length + 40])


def _frame_and_more(random: Random, length: int) -> bytes:
    frame = zstandard.compress(bytes(length))
    return frame + random.choice([b"\0", frame, b"\x50\x2a\x4d\x18\x00\x00\x00\x00"])


_FRAMES = [_frame_of_other_length, _frame_with_forged_header, _frame_with_forged_header, _broken_frame, _frame_and_more]


# ---- JSON


class Text(bytes):
    """A part of a JSON text as it is to stand there, whatever it is."""


class Twice(dict[str, Any]):
    """A JSON object whose first key stands there twice."""


def json_text(value: Any) -> bytes:
    """JSON of what json.dumps would refuse, too."""
    if isinstance(value, Text):
        return bytes(value)
    if isinstance(value, dict):
        members = [json_text(key) + b":" + json_text(item) for key, item in value.items()]
        if isinstance(value, Twice) and members:
            members.append(members[0])
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(json_text, value)) + b"]"
    if isinstance(value, int) and abs(value) >= 2**64:
        return str(value).encode()
    return json.dumps(value).encode()


def resealed(random: Random, value: Any, min_bytes: int) -> bytes:
    """The sealed bytes of a JSON object."""
    text = json_text(value)
    if not text.endswith(b"}") or text.endswith(b"{}"):
        text = b'{"a":' + text + b"}"
    return seal(text, min_bytes=min_bytes if random.random() < 0.97 else 0)


def with_hostile_values(random: Random, value: Any) -> Any:
    """A copy of a JSON value, one to three places of which were made hostile."""
    changed = msgspec.json.decode(msgspec.json.encode(value))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = _places(changed)
        if not places:
            break
        container, key = random.choice(places)
        random.choice(_CHANGES)(random, container, key)
    return changed


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        members = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        found += [(node, key) for key, _ in members]
        stack += [item for _, item in members]
    return found


def _replace(random: Random, container: Any, key: Any) -> None:
    container[key] = copy.deepcopy(hostile_value(random))  # what is chosen from is not to be changed by what follows


def _remove(random: Random, container: Any, key: Any) -> None:
    del container[key]


def _rename(random: Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container[random.choice(["", "$", "$$", "a.b", "items", "tree", "base", "other", "é", "\x1b[2J"])] = (
            container.pop(key)
        )


def _duplicate(random: Random, container: Any, key: Any) -> None:
    if isinstance(container, list):
        container.insert(key, container[key])
    elif isinstance(container[key], dict):
        container[key] = Twice(container[key])


def _repeat(random: Random, container: Any, key: Any) -> None:
    times = random.choice([2, 10, 100])
    if isinstance(container[key], list) and len(json_text(container[key])) * times < MAX_REPEATED_BYTES:
        container[key] = container[key] * times


def _nudge(random: Random, container: Any, key: Any) -> None:
    if isinstance(container[key], int):
        container[key] += random.choice([-1, 1, 4, -4, 2**20])


def _move(random: Random, container: Any, key: Any) -> None:
    """Wrap what stands there, as a part of something else."""
    inner = container[key]
    container[key] = random.choice(
        [
            [inner],
            {"$": "tuple", "items": [inner, inner]},
            {"$": "registered", "name": "point", "tree": inner},
            {"$": "dict", "items": [[inner, inner]]},
            {"$": "set", "items": [inner]},
            {"$": "ordered_dict", "items": [["a", inner]], "metadata": inner},
        ]
    )


def _exchange(random: Random, container: Any, key: Any) -> None:
    other = random.choice(list(container if isinstance(container, dict) else range(len(container))))
    container[key], container[other] = container[other], container[key]


_CHANGES: list[Callable[[Random, Any, Any], None]] = [
    *(_replace, _replace, _replace, _replace),
    *(_remove, _rename, _duplicate, _repeat, _nudge, _nudge, _move, _exchange),
]


def hostile_value(random: Random) -> Any:
    """A JSON value that is not what anybody expects."""
    return random.choice(_VALUES)(random)


def _number(random: Random) -> Any:
    return random.choice([*NUMBERS, 0.5, -0.0, 1e308, 5e-324, True, False, None])


def _literal(random: Random) -> Any:
    return Text(random.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"01", b"-0", b"1.", b"nul", b"", b"'a'"]))


def _text(random: Random) -> Any:
    return random.choice(
        [
            *(
                "",
                "$",
                "a.b",
                "[0]",
                "../../etc/passwd",
                "/",
                "chunks/",
                "float32",
                "<f4",
                "|O",
                "|S99999999",
                "<U0",
                "|V8",
            ),
            *(
                "cuda:300",
                "meta",
                "cpu\n",
                "nan",
                "deleted",
                "committed",
                "0" * 64,
                SAVES[0],
                "A" * 32,
                "a" * 32 + "\n",
            ),
            *(
                "\x00",
                "\x1b]0;x\x07",
                "\u202e",
                "\ufeff",
                "a\u0301",
                "\u2028",
                "\U0010ffff",
                "٣",
                "x" * 20_000,
                "0" * 9001,
            ),
            *("2026-02-30T01:02:03Z", "2026-11-25T01:02:03.000004Z", "<M8[999999999ns]", "<M8[0D]", "float4_e2m1fn_x2"),
            Text(b'"\\ud800"'),
            Text(b'"\xff\xfe"'),
            Text(b'"\\u0000"'),
            Text(b'"\xed\xa0\x80"'),
        ]
    )


def _deep(random: Random) -> Any:
    depth = random.choice([50, 99, 100, 101, 102, 300, 450, 900, 5000])
    before, after = random.choice(
        [
            (b"[", b"]"),
            (b'{"a":', b"}"),
            (b'{"$":"tuple","items":[', b"]}"),
            (b'{"$":', b"}"),
            (b'{"$":"dict","items":[[', b",1]]}"),
        ]
    )
    return Text(before * depth + b"1" + after * depth)


def _wide(random: Random) -> Any:
    count = random.choice([200, 1000])
    item = random.choice([0, [], {}, "a", [1, 2], {"$": "float", "bits": "7ff8000000000000"}])
    return random.choice([[item] * count, {"$": "tuple", "items": [item] * count}, {"k" * 5000: [item] * count}])


def _equal_hashes(random: Random) -> Any:
    members: list[Any] = [
        {"$": "int", "hex": hex((2**61 - 1) * number)} for number in range(1, random.choice([101, 102, 2000]))
    ]
    if random.random() < 0.3:
        members = [{"$": "tuple", "items": [member]} for member in members]
    pairs: Any = [[member, 1] for member in members]
    return random.choice(
        [{"$": "set", "items": members}, {"$": "dict", "items": pairs}, {"$": "counter", "items": pairs}]
    )


def _node(random: Random) -> Any:
    """A tagged node, right or wrong."""
    tag: Any = random.choice([*_TAGS, *_TAGS, "other", "", 1, None, [], {}])
    node: dict[str, Any] = {"$": tag}
    for name, choices in _MEMBERS.items():
        if random.random() < 0.35:
            node[name] = random.choice(choices) if random.random() < 0.85 else hostile_value(random)
    return node


_TAGS: list[str] = [
    *(
        "tensor",
        "ndarray",
        "blob",
        "dict",
        "ordered_dict",
        "defaultdict",
        "counter",
        "tuple",
        "set",
        "frozenset",
        "deque",
    ),
    *("registered", "int", "float", "complex", "str", "bytes", "scalar", "size", "dtype", "device"),
]
_MEMBERS: dict[str, list[Any]] = {
    "items": [
        [],
        [1],
        [["a", 1]],
        [["a", 1], ["a", 2]],
        [[[], 1]],
        [1, 1],
        [1, True, 1.0],
        [{"$": "set", "items": []}],
        {},
        "ab",
    ],
    "tree": [1, {}, {"$": "tensor", "dtype": "float32", "shape": [1], "segment": 0}],
    "metadata": [{}, {"": {"version": 1}}, 5],
    "factory": ["list", "int", None, "eval", "__import__", "type"],
    "maxlen": [None, 0, 1, 2**63 - 1, 2**63],
    "name": [
        "point",
        "float32",
        "quint8",
        "bits8",
        "float99",
        "cuda",
        "cpu:44",
        "xla:0",
        "privateuseone",
        "",
        "os.system",
    ],
    "hex": ["", "00", "0x5", "-0x5", "0" * 5000, "f" * 5000, "zz", "٣", "1_0", "d800", "eda080"],
    "bits": ["7ff8000000000000", "3ff0000000000000", 32 * "f", "", "0"],
    "dtype": [
        "float32",
        "bfloat16",
        "<f4",
        "|u1",
        "<U3",
        "|S0",
        "<U0",
        ">M8[ns]",
        "<M8[7D]",
        "complex32",
        "float8_e8m0fnu",
        "|b1",
    ],
    "shape": [[], [0], [1], [3], [2, 2], [2**48], [2**31, 2**31], [1] * 64, [1] * 65, [0, 2**62], [-1], [True], [1.0]],
    "segment": [0, 1, 2, 3, 99, -1],
    "offset": [0, 1, 4, 8, 2**62],
    "stride": [[], [0], [1], [1, 2], [2**62], [2, 1], None, [0] * 64],
    "requires_grad": [True, False],
    "parameter": [True, False],
}
_VALUES: list[Callable[[Random], Any]] = [
    *[_number] * 4,
    *[_text] * 4,
    *[_node] * 6,
    _literal,
    _deep,
    _wide,
    _equal_hashes,
]


def claimed_segment_bytes(value: Any) -> int:
    """What a manifest says that its tensors take, as far as it says anything; hostile values count nothing."""
    segments = value.get("segments") if isinstance(value, dict) else None
    lengths = [each.get("bytes") for each in segments if isinstance(each, dict)] if isinstance(segments, list) else []
    return sum(
        length for length in lengths if isinstance(length, int) and 0 <= length <= 2**62 and math.isfinite(length)
    )
