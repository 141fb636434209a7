"""The names and numbers of the format: version, sizes, keys. Pure; docs/format.md is the same in prose.

Keys are made and parsed here and nowhere else, always from checked parts: no object's text is ever taken
as a path.
"""

import operator
import re
import secrets
from dataclasses import dataclass
from typing import Literal

from ckptstore.errors import InvalidInputError

FORMAT_VERSION = 1
"""Of sealed JSON objects that name no delta. Chunks and deltas carry a version of their own (chunk.py)."""
DELTA_FORMAT_VERSION = 2
"""Of manifests and condemned lists that name a delta, so that a reader that knows none says so."""
BLOCK_FORMAT_VERSION = 3
"""Of manifests in which a segment is put together of blocks; they may name deltas too."""

Codec = Literal["none", "fast", "small"]
"""How chunks are written; all of them are read. `none`: as they are. `fast`: in planes, compressed where that pays.
`small`: as for `fast`, or as the difference to a chunk of an earlier checkpoint."""

DEFAULT_CHUNK_BYTES = 8 * 2**20
DEFAULT_SMALL_BYTES = 64 * 2**10
"""Segments shorter than this are packed together into bundles."""
MAX_CHUNK_BYTES = 2**30
MAX_OVERHEAD_BYTES = 104
"""How much longer than its raw bytes a chunk object can be: its header and table."""
MAX_DELTA_DEPTH = 64
"""How many deltas may stand one on another, above a chunk that needs none."""
MAX_BLOCK_DIMENSIONS = 31
"""Of a segment that is put together of blocks: NumPy 1 has arrays of 32, and one is for the bytes of an item."""
MAX_STEP = 2**63 - 1
MANY_CHUNKS = 16_000
"""Sixteen pages of a listing on S3; the chunks of a store have 256 prefixes."""
MIN_MANIFEST_BYTES = 1024
"""A committed manifest is padded to this. Fences and tombstones are shorter, so a listing tells them apart."""

FAMILY_DIGITS = 24
"""How many of the 32 digits of a save id, the last ones, the processes of a joint save share."""

MARKER_KEY = "ckptstore.json"
SESSIONS = "sessions/"
CHUNKS = "chunks/"
DELTAS = "deltas/"
RUNS = "runs/"
CONDEMNED = "condemned/"
TAGS = "tags/"
SCRATCH = "scratch/"
"""What trials of a backend write, and delete again."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAVE_ID = re.compile(r"[0-9a-f]{32}")
RUN_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+=,-]{0,127}"
_RUN_NAME = re.compile(RUN_NAME)
_CHUNK_KEY = re.compile(r"(chunks/|deltas/)([0-9a-f]{2})/([0-9a-f]{64})\.([0-9a-f]{32})")
_TAG_KEY = re.compile(r"tags/([^/]+)/([0-9]{20})/([^/]+)\.json")
_MANIFEST_KEY = re.compile(r"runs/([^/]+)/([0-9]{20})\.([0-9a-f]{32})\.json")


def new_save_id() -> str:
    """A fresh random name for one save or one condemned list: 128 bits in hex."""
    return secrets.token_hex(16)


def new_joint_save_id() -> str:
    """Likewise, for a save of many processes: `part_id` gives each an id of its own to upload chunks under."""
    return f"{0:08x}{secrets.token_hex(FAMILY_DIGITS // 2)}"


def part_id(save_id: str, number: int) -> str:
    """The id that the process `number`, from 0 on, of a joint save uploads its chunks under.

    Its own, because two processes may hold equal bytes, and no key is ever written twice.
    """
    return f"{number + 1:08x}{family(save_id)}"


def family(save_id: str) -> str:
    """What the ids of all processes of a joint save, and that of its session, have in common."""
    return save_id[-FAMILY_DIGITS:]


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def is_save_id(text: object) -> bool:
    return isinstance(text, str) and _SAVE_ID.fullmatch(text) is not None


def is_run_name(text: object) -> bool:
    return isinstance(text, str) and _RUN_NAME.fullmatch(text) is not None


def check_run_name(name: object) -> str:
    """Return `name`, or raise InvalidInputError that says what a run may be called."""
    if not is_run_name(name):
        raise InvalidInputError(
            f"{name!r} cannot be the name of a run: use 1 to 128 letters, digits and . _ + = , - "
            "with a letter, a digit or _ first (no slash, no space), such as 'lstm-bible_lr=0.001'."
        )
    assert isinstance(name, str)
    return name


def check_tag(name: object) -> str:
    """Return `name`, or raise InvalidInputError that says what a tag may be called."""
    if not is_run_name(name):
        raise InvalidInputError(
            f"{name!r} cannot be a tag: use 1 to 128 letters, digits and . _ + = , - with a letter, a digit or _ first "
            "(no slash, no space), such as 'best'."
        )
    assert isinstance(name, str)
    return name


def check_step(step: object) -> int:
    """Return `step` as an int, or raise InvalidInputError. A bool, a float or a negative number is no step."""
    try:
        # NumPy's integers and 0-d integer tensors are steps too; arrays, float and bool tensors are not.
        if isinstance(step, bool) or str(getattr(step, "dtype", "")).endswith("bool"):
            raise TypeError
        number = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidInputError(f"step must be a whole number, not {step!r} of type {type(step).__name__}.") from None
    if not 0 <= number <= MAX_STEP:
        raise InvalidInputError(f"step must lie between 0 and 2**63-1, not {number}.")
    return number


def split_run(text: str) -> tuple[str, int | None]:
    """The run and the step of RUN[@STEP]. Raises InvalidInputError."""
    run, at, digits = text.partition("@")
    if not at:
        return check_run_name(run), None
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise InvalidInputError(f"{text!r} is no RUN@STEP: the step must be a whole number, as in lstm@300.")
    return check_run_name(run), check_step(int(digits))


def check_digest(digest: object) -> str:
    """Return `digest`, or raise InvalidInputError that says what the digest of a checkpoint looks like."""
    if not is_digest(digest):
        raise InvalidInputError(
            f"{digest!r:.100} cannot be the digest of a checkpoint: it is a str of 64 hex digits in small letters, as "
            "checkpoint.digest gives it and `ckptstore show` prints it."
        )
    assert isinstance(digest, str)
    return digest


def session_key(save_id: str) -> str:
    return f"{SESSIONS}{save_id}.json"


def session_of(key: str) -> str | None:
    """The save id in a session's key; None if it is none."""
    save_id = key.removeprefix(SESSIONS).removesuffix(".json")
    return save_id if is_save_id(save_id) and key == session_key(save_id) else None


def condemned_key(collection_id: str) -> str:
    return f"{CONDEMNED}{collection_id}.json"


def chunk_key(digest: str, save_id: str, *, is_delta: bool = False) -> str:
    return f"{DELTAS if is_delta else CHUNKS}{digest[:2]}/{digest}.{save_id}"


def chunk_prefixes(folder: str, count: int) -> list[str]:
    """How to list a folder of about so many chunks: in one go, or by the first byte of their digests, side by side."""
    return [folder] if count <= MANY_CHUNKS else [f"{folder}{first:02x}/" for first in range(256)]


def run_prefix(run: str) -> str:
    return f"{RUNS}{run}/"


def tag_prefix(run: str) -> str:
    return f"{TAGS}{run}/"


def manifest_key(run: str, step: int, save_id: str) -> str:
    return f"{RUNS}{run}/{step:020d}.{save_id}.json"


@dataclass(frozen=True, slots=True, order=True)
class ChunkKey:
    """The parts of a chunk's key: digest of the raw bytes, the save that uploaded it (both hex), full or a delta."""

    digest: str
    save_id: str
    is_delta: bool = False

    def __str__(self) -> str:
        return chunk_key(self.digest, self.save_id, is_delta=self.is_delta)

    @classmethod
    def parse(cls, key: str) -> "ChunkKey | None":
        match = _CHUNK_KEY.fullmatch(key)
        if match is None or match[2] != match[3][:2]:
            return None
        return cls(match[3], match[4], match[1] == DELTAS)


@dataclass(frozen=True, slots=True, order=True)
class ManifestKey:
    """The parts of a manifest's key: run, step and save id."""

    run: str
    step: int
    save_id: str

    def __str__(self) -> str:
        return manifest_key(self.run, self.step, self.save_id)

    @classmethod
    def parse(cls, key: str) -> "ManifestKey | None":
        match = _MANIFEST_KEY.fullmatch(key)
        if match is None or not is_run_name(match[1]) or int(match[2]) > MAX_STEP:
            return None
        return cls(match[1], int(match[2]), match[3])


@dataclass(frozen=True, slots=True, order=True)
class TagKey:
    """The parts of a tag's key: run, step and the tag."""

    run: str
    step: int
    tag: str

    def __str__(self) -> str:
        return f"{TAGS}{self.run}/{self.step:020d}/{self.tag}.json"

    @classmethod
    def parse(cls, key: str) -> "TagKey | None":
        match = _TAG_KEY.fullmatch(key)
        if match is None or not is_run_name(match[1]) or not is_run_name(match[3]) or int(match[2]) > MAX_STEP:
            return None
        return cls(match[1], int(match[2]), match[3])
