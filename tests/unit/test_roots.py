"""What a collection keeps of manifests: which chunks they name, full ones and deltas apart."""

import msgspec

from ckptstore.format import ChunkKey
from ckptstore.manifest import ChunkRef, Manifest, Writer, encode
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.roots import Roots, _add_step

DIGESTS, SAVE = [64 * digit for digit in "123"], 32 * "a"


def naming(*refs: ChunkRef) -> Manifest:
    return Manifest(
        run="run",
        step=1,
        save=SAVE,
        created="2026-11-25T01:02:03Z",
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={},
        metadata={},
        content=64 * "0",
        raw_bytes=0,
        stored_bytes=0,
        new_bytes=0,
        tree=None,
        segments=[],
        chunks=list(refs),
    )


def ref(digest: str, base: int | None = None) -> ChunkRef:
    return ChunkRef(digest=digest, save=SAVE, raw=1, stored=1, base=base)


def test_a_full_chunk_is_not_needed_because_a_delta_of_its_name_is() -> None:
    roots = Roots()
    roots.add(naming(ref(DIGESTS[0]), ref(DIGESTS[1], base=0)))
    assert roots.needs(ChunkKey(DIGESTS[0], SAVE)) and roots.needs(ChunkKey(DIGESTS[1], SAVE, is_delta=True))
    assert not roots.needs(ChunkKey(DIGESTS[0], SAVE, is_delta=True))
    assert not roots.needs(ChunkKey(DIGESTS[1], SAVE))


def test_what_several_manifests_name_counts_once() -> None:
    roots = Roots()
    roots.add(naming(ref(DIGESTS[0]), ref(DIGESTS[1], base=0)))
    roots.add(naming(ref(DIGESTS[0]), ref(DIGESTS[1], base=0), ref(DIGESTS[2], base=0)))
    assert (len(roots.named), roots.deltas, roots.checkpoints) == (3, 2, 2)


def test_a_chunk_that_another_save_has_uploaded_is_not_needed() -> None:
    roots = Roots()
    roots.add(naming(ref(DIGESTS[0])))
    assert roots.names(f"chunks/11/{DIGESTS[0]}.{SAVE}")
    assert not roots.names(f"chunks/11/{DIGESTS[0]}.{32 * 'b'}")


def test_a_manifest_that_is_just_being_replaced_counts_in_every_reading_but_the_first() -> None:
    """The first one has it buried before anything is condemned; later a save may be about to take chunks from it."""
    old = naming(ref(DIGESTS[0]))
    new = msgspec.structs.replace(old, save=32 * "b", replaces=[SAVE])
    found = [(each.key, ObjectInfo(str(each.key), 2000, 1.0), encode(each)) for each in (old, new)]
    first, later = Roots(), Roots(was_read=True)
    _add_step(first, list(found))
    _add_step(later, list(found))
    assert (first.checkpoints, first.replaced) == (1, [old.key])
    assert (later.checkpoints, later.replaced) == (2, [])
