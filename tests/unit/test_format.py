"""Keys are made from checked parts and parse back; whatever is not exactly such a key is nothing to us."""

import numpy as np
import pytest
import torch

from ckptstore.errors import InvalidInputError
from ckptstore.format import (
    MAX_STEP,
    ChunkKey,
    ManifestKey,
    check_run_name,
    check_step,
    condemned_key,
    is_digest,
    is_run_name,
    is_save_id,
    new_save_id,
    run_prefix,
    session_key,
)

DIGEST = "ab" + 62 * "0"
SAVE = 32 * "c"
CHUNK = f"chunks/ab/{DIGEST}.{SAVE}"
MANIFEST = f"runs/lstm/00000000000000000300.{SAVE}.json"


def test_the_keys_are_the_ones_in_the_document() -> None:
    assert str(ChunkKey(DIGEST, SAVE)) == CHUNK
    assert str(ManifestKey("lstm", 300, SAVE)) == MANIFEST
    assert session_key(SAVE) == f"sessions/{SAVE}.json"
    assert condemned_key(SAVE) == f"condemned/{SAVE}.json"


def test_keys_parse_back() -> None:
    assert ChunkKey.parse(CHUNK) == ChunkKey(DIGEST, SAVE)
    assert ManifestKey.parse(MANIFEST) == ManifestKey("lstm", 300, SAVE)


def test_a_manifest_stands_below_the_prefixes_of_its_run_and_its_step() -> None:
    assert MANIFEST.startswith(run_prefix("lstm"))


def test_manifests_sort_by_step() -> None:
    keys = [ManifestKey("lstm", step, SAVE) for step in (0, 9, 10, 2**40, MAX_STEP)]
    assert sorted(map(str, keys)) == [str(key) for key in keys]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "chunks/",
        f"/{CHUNK}",
        f"./{CHUNK}",
        f"x/{CHUNK}",
        f"{CHUNK}\n",
        f"{CHUNK}.tmp",
        CHUNK.upper(),
        CHUNK.replace("ab", "AB"),
        CHUNK.replace("chunks/ab", "chunks/.."),
        CHUNK.replace("chunks/ab", "chunks/ac"),
        CHUNK.replace("chunks", "delta"),
        CHUNK.replace("chunks/", "chunks/deltas/"),
        CHUNK.replace("0.c", "0..c"),
        CHUNK[:-1],
        CHUNK + "c",
        f"chunks/ab/{DIGEST}",
        f"chunks/ab/{DIGEST}0.{SAVE}",
        f"chunks/ab/{DIGEST}.{SAVE[:-1]}g",
        f"chunks/ab/{DIGEST}.{SAVE[:-1]}٣",
    ],
)
def test_what_is_not_exactly_a_chunks_key_is_none(key: str) -> None:
    assert key != CHUNK
    assert ChunkKey.parse(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "",
        "runs/",
        f"/{MANIFEST}",
        f"{MANIFEST}\n",
        f"{MANIFEST}.tmp",
        MANIFEST.replace("lstm", ".."),
        MANIFEST.replace("lstm", "."),
        MANIFEST.replace("lstm", ""),
        MANIFEST.replace("lstm", "a/b"),
        MANIFEST.replace("lstm", "../lstm"),
        MANIFEST.replace("lstm", ".tmp-1"),
        MANIFEST.replace("lstm", "a b"),
        MANIFEST.replace("lstm", "a\\b"),
        MANIFEST.replace("lstm", "a\0"),
        MANIFEST.replace("lstm", "é"),
        MANIFEST.replace("lstm", 129 * "a"),
        MANIFEST.replace(SAVE, SAVE.upper()),
        MANIFEST.replace("00300", "0300"),
        MANIFEST.replace("00300", "000300"),
        MANIFEST.replace("00300", "-0300"),
        MANIFEST.replace("00300", "0030٣"),
        MANIFEST.replace("00000000000000000300", f"{MAX_STEP + 1:020d}"),
    ],
)
def test_what_is_not_exactly_a_manifests_key_is_none(key: str) -> None:
    assert key != MANIFEST
    assert ManifestKey.parse(key) is None


def test_the_longest_names_and_the_last_step_have_keys() -> None:
    key = ManifestKey(128 * "a", MAX_STEP, SAVE)
    assert ManifestKey.parse(str(key)) == key
    # 255 bytes is what file systems and 1024 what buckets allow.
    assert all(len(name) <= 255 for name in str(key).split("/"))
    assert len(str(key)) <= 512


def test_save_ids_are_new_each_time() -> None:
    names = {new_save_id() for _ in range(100)}
    assert len(names) == 100
    assert all(is_save_id(name) for name in names)


@pytest.mark.parametrize(
    "text", [None, 5, b"ab", "", DIGEST[1:], DIGEST + "0", DIGEST + "\n", DIGEST.upper(), " " + DIGEST]
)
def test_what_is_not_64_small_hex_digits_is_no_digest(text: object) -> None:
    assert is_digest(DIGEST)
    assert not is_digest(text)


@pytest.mark.parametrize("text", [None, 5, b"ab", "", SAVE[1:], SAVE + "0", SAVE + "\n", SAVE.upper(), " " + SAVE])
def test_what_is_not_32_small_hex_digits_is_no_save_id(text: object) -> None:
    assert not is_save_id(text)


@pytest.mark.parametrize("name", ["a", "_", "0", "lstm-bible_lr=0.001", "v1.2+x,y", 128 * "x"])
def test_a_run_may_be_called(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "name", [None, 5, b"run", "", ".", "..", ".hidden", "-x", "a/b", "a b", "a\n", "é", "a:b", "a*", 129 * "x"]
)
def test_a_run_may_not_be_called(name: object) -> None:
    assert not is_run_name(name)
    with pytest.raises(InvalidInputError, match="cannot be the name of a run: use 1 to 128 letters"):
        check_run_name(name)


@pytest.mark.parametrize("step", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7)])
def test_whole_numbers_of_any_type_are_steps(step: object) -> None:
    number = check_step(step)
    assert number == 7
    assert type(number) is int


@pytest.mark.parametrize(
    "step",
    [
        *(True, None, "7", 7.0, 7 + 0j, b"7", [7], int),
        *(np.bool_(True), np.float64(7), np.array([7, 8]), np.array(True)),
        *(torch.tensor(True), torch.tensor(7.0), torch.tensor([7, 8])),
    ],
    ids=repr,
)
def test_anything_else_is_no_step(step: object) -> None:
    with pytest.raises(InvalidInputError, match="step must be a whole number, not"):
        check_step(step)


@pytest.mark.parametrize("step", [-1, MAX_STEP + 1, 10**30])
def test_a_step_lies_between_0_and_the_largest_of_64_bits(step: int) -> None:
    assert check_step(0) == 0
    assert check_step(MAX_STEP) == MAX_STEP
    with pytest.raises(InvalidInputError, match=r"step must lie between 0 and 2\*\*63-1"):
        check_step(step)
