"""Sealed JSON: any program can read it, and any change of it is seen."""

import json

import blake3
import pytest

from ckptstore.errors import CorruptError
from ckptstore.sealed import seal, unseal

TEXT = b'{"format":1,"name":"caf\xc3\xa9","deep":{"a":[1,{}]}}'


def test_what_was_sealed_is_unsealed() -> None:
    assert unseal(seal(TEXT), "key") == TEXT


def test_it_is_one_line_of_json_with_the_digest_of_all_that_stands_before_it() -> None:
    content = seal(TEXT)
    members = json.loads(content)
    digest = members.pop("digest")
    assert members == json.loads(TEXT)
    assert digest == blake3.blake3(content[: content.index(b',"digest"')]).hexdigest()
    assert content.endswith(b'"}\n')
    assert content.count(b"\n") == 1


@pytest.mark.parametrize("min_bytes", [0, 1, 130, 131, 132, 133, 1024])
def test_padding_makes_it_as_long_as_asked_and_no_longer(min_bytes: int) -> None:
    content = seal(TEXT, min_bytes=min_bytes)
    assert len(content) == max(min_bytes, len(seal(TEXT)))
    assert json.loads(unseal(content, "key")) == json.loads(TEXT)


@pytest.mark.parametrize("min_bytes", [0, 200])
def test_every_flipped_bit_is_seen(min_bytes: int) -> None:
    content = seal(TEXT, min_bytes=min_bytes)
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(CorruptError):
                unseal(bytes(flipped), "key")


def test_every_truncation_is_seen() -> None:
    content = seal(TEXT)
    for length in range(len(content)):
        with pytest.raises(CorruptError):
            unseal(content[:length], "key")
        with pytest.raises(CorruptError):
            unseal(content[len(content) - length :], "key")


@pytest.mark.parametrize("added", [b"\n", b" ", b"\0", seal(TEXT)])
def test_every_added_byte_is_seen(added: bytes) -> None:
    for content in (seal(TEXT) + added, added + seal(TEXT)):
        with pytest.raises(CorruptError):
            unseal(content, "key")


def test_a_seal_around_nothing_is_none() -> None:
    digest = blake3.blake3(b"").hexdigest()
    with pytest.raises(CorruptError):
        unseal(f',"digest":"{digest}"}}\n'.encode(), "key")


def test_the_error_names_the_object_and_says_what_may_have_happened() -> None:
    with pytest.raises(CorruptError, match=r"runs/a/1\.json is damaged \(3 bytes\).*cut off, or written by something"):
        unseal(b"{}\n", "runs/a/1.json")


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"a":1} ', b"1"])
def test_only_the_text_of_an_object_with_members_can_be_sealed(text: bytes) -> None:
    with pytest.raises(AssertionError):
        seal(text)
