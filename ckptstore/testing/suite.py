"""The tests of everything that a backend promises."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptstore.objects.base import Bytes, Objects
from ckptstore.objects.open import self_test

WRITERS = 16


class BackendSuite:
    """Tests of everything that `Objects` promises.

    Subclass it and give it your backend, empty and new for each test:

        class TestMyBackend(BackendSuite):
            @pytest.fixture
            def objects(self, tmp_path):
                return MyObjects(tmp_path / "store")

    The fixture must return a place where nothing was ever put; it need not exist yet if the backend makes it.
    """

    @pytest.fixture
    def objects(self) -> Objects:
        """Return the backend under test, at an empty place. To be overridden."""
        raise NotImplementedError("override the fixture `objects` in your subclass of BackendSuite")

    def test_it_has_an_url_and_a_number_of_requests(self, objects: Objects) -> None:
        """Both are shown to users and size the thread pools."""
        assert objects.url
        assert objects.request_threads >= 1

    def test_it_passes_the_self_test(self, objects: Objects) -> None:
        """The same that a store does when it is made; it leaves nothing behind."""
        self_test(objects)
        assert objects.list("") == []

    def test_an_empty_place_holds_nothing(self, objects: Objects) -> None:
        """A place that was never used is empty, and not an error."""
        assert objects.get("a/b") is None
        assert objects.get_unchecked("a/b") is None
        assert objects.list("") == []
        assert objects.list("a/") == []
        assert objects.children("") == []
        assert objects.children("a/") == []

    def test_a_created_object_is_got_back(self, objects: Objects) -> None:
        """Create of a new key puts it."""
        assert objects.create("runs/a/1.json", b"content") is True
        assert objects.get("runs/a/1.json") == b"content"
        assert objects.get_unchecked("runs/a/1.json") == b"content"

    def test_a_second_create_changes_nothing(self, objects: Objects) -> None:
        """Create of a key that exists says no."""
        assert objects.create("key", b"first") is True
        assert objects.create("key", b"second, longer") is False
        assert objects.create("key", b"first") is False
        assert objects.get("key") == b"first"

    def test_create_refuses_a_key_that_was_put(self, objects: Objects) -> None:
        """It does not matter how the key came to be."""
        objects.put("key", b"put")
        assert objects.create("key", b"created") is False
        assert objects.get("key") == b"put"

    def test_a_deleted_key_can_be_created_again(self, objects: Objects) -> None:
        """Create looks at what is there, not at what was."""
        objects.create("key", b"first")
        objects.delete("key")
        assert objects.create("key", b"second") is True
        assert objects.get("key") == b"second"

    def test_one_of_many_concurrent_creates_wins(self, objects: Objects) -> None:
        """Sixteen threads start at once: one True, and the object is that one's, whole."""
        contents = [bytes([number]) * 50_000 for number in range(WRITERS)]
        start = threading.Barrier(WRITERS)

        def create(content: bytes) -> bool:
            start.wait()
            return objects.create("contested/key", content)

        with ThreadPoolExecutor(WRITERS) as pool:
            won = list(pool.map(create, contents))
        assert won.count(True) == 1
        assert objects.get("contested/key") == contents[won.index(True)]
        assert [row.key for row in objects.list("")] == ["contested/key"]

    def test_a_reader_never_sees_a_part(self, objects: Objects) -> None:
        """While a create is under way there is no object, then all of it."""
        content = bytes(range(256)) * 8192
        seen: list[bytes | None] = []
        with ThreadPoolExecutor(1) as pool:
            creating = pool.submit(objects.create, "large", content)
            while not creating.done():
                seen.append(objects.get("large"))
            assert creating.result() is True
        seen.append(objects.get("large"))
        assert all(got is None or got == content for got in seen)
        assert seen[-1] == content

    def test_concurrent_puts_leave_one_whole_content(self, objects: Objects) -> None:
        """Puts of one key race on no shared temporary name, and replace as a whole."""
        contents = [bytes([number]) * 50_000 for number in range(WRITERS)]
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda content: objects.put("key", content), contents))
        assert objects.get("key") in contents
        assert len(objects.list("")) == 1

    def test_many_threads_use_different_keys(self, objects: Objects) -> None:
        """Folders and connections are made by many threads at a time."""
        keys = [f"chunks/{number % 4:02x}/{number:03d}" for number in range(4 * WRITERS)]
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda key: objects.put(key, key.encode()), keys))
            assert list(pool.map(objects.get, keys)) == [key.encode() for key in keys]

    def test_put_replaces_the_whole_object(self, objects: Objects) -> None:
        """Also by a shorter one."""
        objects.put("key", b"a long first content")
        objects.put("key", b"short")
        assert objects.get("key") == b"short"
        assert [(row.key, row.size) for row in objects.list("key")] == [("key", 5)]

    def test_get_of_an_absent_key_is_none(self, objects: Objects) -> None:
        """Beside other keys, below one, and for a folder of keys."""
        objects.put("folder/key", b"x")
        assert objects.get("folder/other") is None
        assert objects.get("other/key") is None
        assert objects.get("folder") is None
        assert objects.get("folder/key/below") is None

    def test_get_gives_bytes(self, objects: Objects) -> None:
        """Not a buffer that could change."""
        objects.put("key", bytearray(b"x"))
        assert type(objects.get("key")) is bytes

    @pytest.mark.parametrize("method", ["create", "put"])
    def test_empty_content_is_kept(self, objects: Objects, method: str) -> None:
        """An object of no bytes exists."""
        getattr(objects, method)("empty", b"")
        assert objects.get("empty") == b""
        assert [(row.key, row.size) for row in objects.list("")] == [("empty", 0)]

    @pytest.mark.parametrize("method", ["create", "put"])
    def test_nine_mebibytes_come_back(self, objects: Objects, method: str) -> None:
        """More than one part or read of most backends; every byte value."""
        content = bytes(range(256)) * (9 * 2**20 // 256) + b"end"
        getattr(objects, method)("chunks/ab/large", content)
        assert objects.get("chunks/ab/large") == content
        assert objects.list("chunks/")[0].size == len(content)

    @pytest.mark.parametrize("method", ["create", "put"])
    @pytest.mark.parametrize(
        "content",
        [
            bytearray(b"0123456789"),
            memoryview(b"0123456789"),
            memoryview(bytearray(b"__0123456789__"))[2:12],
            memoryview(b"0123456789").cast("H"),
        ],
        ids=["bytearray", "memoryview", "slice", "two-byte-items"],
    )
    def test_buffers_are_taken(self, objects: Objects, method: str, content: Bytes) -> None:
        """Bytes are bytes, whatever the type of the buffer and of its items."""
        getattr(objects, method)("key", content)
        assert objects.get("key") == b"0123456789"

    def test_a_buffer_may_change_after_the_put(self, objects: Objects) -> None:
        """Buffers are used again for the next chunk."""
        buffer = bytearray(b"before")
        objects.put("put", buffer)
        objects.create("created", memoryview(buffer))
        buffer[:] = b"after!"
        assert objects.get("put") == objects.get("created") == b"before"

    def test_list_shows_key_size_and_time(self, objects: Objects) -> None:
        """The time is the store's own; two puts are told apart only where it is fine enough."""
        objects.put("a/first", b"123")
        objects.create("a/second", b"12345")
        rows = objects.list("a/")
        assert [(row.key, row.size) for row in rows] == [("a/first", 3), ("a/second", 5)]
        assert all(row.modified > 1_000_000_000 for row in rows)
        assert rows[0].modified <= rows[1].modified + 1

    @pytest.mark.parametrize(
        ("prefix", "found"),
        [
            ("", ["a", "chunks/ab/1.x", "chunks/ab/12.x", "chunks/ac/1.x", "chunksabc", "deep/1/2/3/4"]),
            ("a", ["a"]),
            ("chunks", ["chunks/ab/1.x", "chunks/ab/12.x", "chunks/ac/1.x", "chunksabc"]),
            ("chunks/", ["chunks/ab/1.x", "chunks/ab/12.x", "chunks/ac/1.x"]),
            ("chunks/a", ["chunks/ab/1.x", "chunks/ab/12.x", "chunks/ac/1.x"]),
            ("chunks/ab", ["chunks/ab/1.x", "chunks/ab/12.x"]),
            ("chunks/ab/", ["chunks/ab/1.x", "chunks/ab/12.x"]),
            ("chunks/ab/1", ["chunks/ab/1.x", "chunks/ab/12.x"]),
            ("chunks/ab/12", ["chunks/ab/12.x"]),
            ("chunks/ab/12.x", ["chunks/ab/12.x"]),
            ("chunks/ab/12.x/", []),
            ("chunks/ad", []),
            ("chunks/ab/2", []),
            ("dee", ["deep/1/2/3/4"]),
            ("deep/1/2/", ["deep/1/2/3/4"]),
            ("nothing/here/", []),
        ],
    )
    def test_list_takes_any_prefix(self, objects: Objects, prefix: str, found: list[str]) -> None:
        """A prefix may end in the middle of a name; what lies below is shown at any depth, sorted."""
        for key in ["chunks/ab/12.x", "chunks/ab/1.x", "chunks/ac/1.x", "chunksabc", "a", "deep/1/2/3/4"]:
            objects.put(key, b"x")
        assert [row.key for row in objects.list(prefix)] == found

    def test_list_shows_more_than_a_page(self, objects: Objects) -> None:
        """S3 gives 1000 keys a page; a short listing would cost data."""
        keys = [f"chunks/{number:04d}" for number in range(1005)]
        with ThreadPoolExecutor(objects.request_threads) as pool:
            list(pool.map(lambda key: objects.put(key, b"x"), keys))
        assert [row.key for row in objects.list("chunks/")] == keys
        assert [row.key for row in objects.list("chunks/1")] == keys[1000:]
        assert objects.children("") == ["chunks"]

    def test_children_are_names_with_keys_below(self, objects: Objects) -> None:
        """Each once, without those of objects; a half name is no prefix here."""
        for key in ["runs/b/1", "runs/a/1", "runs/a/2", "runs/c.d/x/y", "runs/file", "runsother/x", "top"]:
            objects.put(key, b"x")
        assert objects.children("runs/") == ["a", "b", "c.d"]
        assert objects.children("") == ["runs", "runsother"]
        assert objects.children("runs/c.d/") == ["x"]
        assert objects.children("runs/a/") == []
        assert objects.children("absent/") == []

    def test_children_go_with_their_last_key(self, objects: Objects) -> None:
        """A folder that is left empty is not a child."""
        objects.put("runs/a/1", b"x")
        objects.put("runs/b/c/1", b"x")
        objects.delete("runs/b/c/1")
        assert objects.children("runs/") == ["a"]
        assert [row.key for row in objects.list("")] == ["runs/a/1"]

    def test_delete_removes_one_key(self, objects: Objects) -> None:
        """And not those whose names it begins."""
        for key in ["a/1", "a/12", "a1"]:
            objects.put(key, b"x")
        objects.delete("a/1")
        assert objects.get("a/1") is None
        assert [row.key for row in objects.list("a")] == ["a/12", "a1"]

    def test_delete_of_an_absent_key_is_fine(self, objects: Objects) -> None:
        """Before anything was put, twice, and in folders that are not there."""
        objects.delete("never/was/here")
        objects.put("a/key", b"x")
        objects.delete("a/key")
        objects.delete("a/key")
        objects.delete("b/key")
        assert objects.list("") == []

    def test_many_keys_are_deleted_at_once(self, objects: Objects) -> None:
        """As many as one call takes; all of them are gone, and nothing else is."""
        keys = [f"chunks/{number % 4:02x}/{number:04d}" for number in range(min(objects.delete_batch, 1000))]
        others = ["chunks/00/0000.other", "chunks/000", "other"]
        with ThreadPoolExecutor(objects.request_threads) as pool:
            list(pool.map(lambda key: objects.put(key, b"x"), keys + others))
        objects.delete_many(keys)
        assert [row.key for row in objects.list("")] == others
        assert objects.get(keys[0]) is None

    def test_absent_keys_among_many_are_fine(self, objects: Objects) -> None:
        """Another collection may have deleted them; those that stand go nevertheless."""
        objects.put("a/here", b"x")
        for some in [["a/absent"], ["b/absent", "a/here"][-objects.delete_batch :], ["a/here"]]:
            objects.delete_many(some)
        assert objects.list("") == []

    def test_delete_of_no_keys_does_nothing(self, objects: Objects) -> None:
        """S3 itself refuses a request that names none."""
        objects.put("key", b"x")
        objects.delete_many([])
        assert objects.get("key") == b"x"

    @pytest.mark.parametrize("name", ["run", "A-Za-z0-9._+=,-", ".hidden", "-dash", "a=b,c+d", "1.5e-3", "UPPER"])
    def test_characters_of_run_names_survive(self, objects: Objects, name: str) -> None:
        """`+` and `=` are the ones that URLs get wrong."""
        key = f"runs/{name}/{7:020d}.{uuid.uuid4().hex}.json"
        assert objects.create(key, name.encode()) is True
        assert objects.create(key, b"other") is False
        assert objects.get(key) == name.encode()
        assert [row.key for row in objects.list(f"runs/{name}/")] == [key]
        assert objects.children("runs/") == [name]
        objects.delete(key)
        assert objects.get(key) is None

    def test_sync_takes_what_was_put_before(self, objects: Objects) -> None:
        """By this writer or another; also none at all."""
        objects.sync([])
        objects.put("chunks/ab/1", b"x")
        objects.create("runs/a/1", b"x")
        objects.sync(["chunks/ab/1", "runs/a/1", "chunks/ab/1"])
        objects.sync(iter(["chunks/ab/1"]))
        assert objects.get("chunks/ab/1") == b"x"
