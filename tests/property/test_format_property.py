"""Keys of any parts parse back, and what parses is the one way to write its parts."""

from hypothesis import given
from hypothesis import strategies as st

from ckptstore.format import MAX_STEP, ChunkKey, ManifestKey, is_run_name

HEX = "0123456789abcdef"
RUNS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+=,-]{0,127}", fullmatch=True)
DIGESTS = st.text(HEX, min_size=64, max_size=64)
SAVES = st.text(HEX, min_size=32, max_size=32)
STEPS = st.integers(0, MAX_STEP)
CHUNK_KEYS = st.builds(ChunkKey, DIGESTS, SAVES)
MANIFEST_KEYS = st.builds(ManifestKey, RUNS, STEPS, SAVES)


@given(CHUNK_KEYS)
def test_chunk_keys_parse_back(key: ChunkKey) -> None:
    assert ChunkKey.parse(str(key)) == key


@given(MANIFEST_KEYS)
def test_manifest_keys_parse_back(key: ManifestKey) -> None:
    assert ManifestKey.parse(str(key)) == key


@given(MANIFEST_KEYS, MANIFEST_KEYS)
def test_the_keys_of_a_run_sort_as_their_steps(one: ManifestKey, two: ManifestKey) -> None:
    two = ManifestKey(one.run, two.step, two.save_id)
    assert (str(one) < str(two)) == ((one.step, one.save_id) < (two.step, two.save_id))


@given(st.one_of(CHUNK_KEYS, MANIFEST_KEYS), st.data())
def test_a_key_that_was_edited_parses_to_itself_or_to_nothing(key: object, data: st.DataObject) -> None:
    text = str(key)
    at = data.draw(st.integers(0, len(text)))
    put_in = data.draw(st.one_of(st.text(max_size=3), st.sampled_from(["/", "../", "..", ".", "\n", "\0", "A", "٣"])))
    edited = text[:at] + put_in + text[at + data.draw(st.integers(0, 3)) :]
    for found in (ChunkKey.parse(edited), ManifestKey.parse(edited)):
        assert found is None or str(found) == edited
        assert found is None or not {"..", ".", ""} & set(edited.split("/"))


@given(st.text(max_size=20))
def test_a_name_with_anything_that_means_something_to_a_file_system_is_no_run(name: str) -> None:
    for hostile in (f"{name}/", f"/{name}", f"{name}\0", f"{name}\n", f".{name}", f"{name}\\", f"{name} "):
        assert not is_run_name(hostile)
