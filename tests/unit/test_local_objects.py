"""LocalObjects: which system calls it makes, what a failing one leaves behind, and what it tells the user."""

import errno
import io
import os
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.objects import local
from ckptstore.objects.local import LocalObjects
from ckptstore.objects.open import open_objects


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "above" / "store"


@pytest.fixture
def objects(root: Path) -> LocalObjects:
    return LocalObjects(root)


@pytest.fixture
def fsynced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were fsynced, in order; temporary files as '.tmp-'."""
    paths: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        paths.append(".tmp-" if ".tmp-" in path else path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


def failing(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_create_that_cannot_be_made_durable_stays_and_is_written_anew_by_sync(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have seen it by then, so it is not taken back."""
    objects.put("runs/other", b"x")
    with monkeypatch.context() as patch:
        patch.setattr("ckptstore.objects.local._fsync_folder", failing(errno.EIO))
        with pytest.raises(UnavailableError, match="cannot create"):
            objects.create("runs/key", b"content")
    assert objects.get("runs/key") == b"content"
    assert objects.create("runs/key", b"other") is False
    first = (root / "runs" / "key").stat().st_ino
    objects.sync(["runs/other"])
    assert (root / "runs" / "key").stat().st_ino == first
    objects.sync(["runs/key"])
    second = (root / "runs" / "key").stat().st_ino
    assert second != first
    assert objects.get("runs/key") == b"content"
    objects.sync(["runs/key"])
    assert (root / "runs" / "key").stat().st_ino == second


def test_a_file_that_somebody_linked_elsewhere_is_not_taken_for_ours(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.create("key", b"first")
    link = os.link

    def link_twice(source: str, target: str) -> None:
        # A backup program makes a link of its own to every new file.
        link(source, f"{source}.backup")
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert objects.create("key", b"second") is False
    assert objects.get("key") == b"first"


def test_constructing_touches_nothing(objects: LocalObjects, root: Path) -> None:
    assert objects.get("a/b") is None
    assert objects.list("") == []
    assert not root.parent.exists()


def test_a_folder_that_another_thread_makes_meanwhile_is_no_error(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def overtaken(path: str, mode: int = 0o777) -> None:
        if not Path(path).parent.exists():
            # Just as we find that the folder above is missing, another thread makes all of them.
            for folder in [*reversed(Path(path).parents), Path(path)]:
                if not folder.exists():
                    mkdir(folder, mode)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", overtaken)
    objects.put("chunks/aa/name", b"content")
    assert objects.get("chunks/aa/name") == b"content"


def test_files_and_folders_are_the_users_alone(objects: LocalObjects, root: Path) -> None:
    old = os.umask(0)
    try:
        objects.put("a/b/put", b"x")
        objects.create("a/b/created", b"x")
    finally:
        os.umask(old)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [root.parent, root, *root.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_the_umask_takes_more_away(objects: LocalObjects, root: Path) -> None:
    old = os.umask(0o277)
    try:
        root.mkdir(parents=True, mode=0o700)
        objects.put("key", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((root / "key").stat().st_mode) == 0o400


def above(root: Path) -> list[str]:
    """The folders above the root, up to where another file system is mounted."""
    device = next(path for path in root.parents if path.exists()).stat().st_dev
    return [str(path) for path in root.parents if not path.exists() or path.stat().st_dev == device]


def test_create_fsyncs_the_file_and_every_folder_above_it(
    objects: LocalObjects, root: Path, fsynced: list[str]
) -> None:
    objects.create("runs/a/1.json", b"x")
    assert fsynced[0] == ".tmp-"
    folders = [root / "runs/a", root / "runs", root]
    assert sorted(fsynced[1:]) == sorted([*map(str, folders), *above(root)])


def test_a_later_create_fsyncs_the_file_and_its_folder_only(
    objects: LocalObjects, root: Path, fsynced: list[str]
) -> None:
    objects.create("runs/a/1.json", b"x")
    fsynced.clear()
    objects.create("runs/a/2.json", b"x")
    assert fsynced == [".tmp-", str(root / "runs/a")]


def test_create_anchors_folders_that_another_process_made(root: Path, fsynced: list[str]) -> None:
    (root / "runs/a").mkdir(parents=True)
    LocalObjects(root).create("runs/a/1.json", b"x")
    assert {str(root), str(root / "runs"), str(root / "runs/a")} <= set(fsynced)


def test_a_lost_create_fsyncs_no_folder(objects: LocalObjects, fsynced: list[str]) -> None:
    objects.create("key", b"x")
    fsynced.clear()
    assert objects.create("key", b"y") is False
    assert fsynced == [".tmp-"]


def test_put_fsyncs_the_file_and_leaves_the_folders_to_sync(objects: LocalObjects, fsynced: list[str]) -> None:
    objects.put("chunks/ab/1", b"x")
    assert fsynced == [".tmp-"]


def test_sync_fsyncs_each_folder_once_the_deepest_first(objects: LocalObjects, root: Path, fsynced: list[str]) -> None:
    keys = ["chunks/ab/1", "chunks/ab/2", "chunks/ac/1", "top"]
    for key in keys:
        objects.put(key, b"x")
    fsynced.clear()
    objects.sync(keys)
    folders = ["chunks/ab", "chunks/ac", "chunks"]
    assert sorted(fsynced) == sorted([*(str(root / name) for name in folders), str(root), *above(root)])
    depths = [len(Path(path).parts) for path in fsynced]
    assert depths == sorted(depths, reverse=True)


def test_the_first_sync_fsyncs_the_folders_above_the_root_whoever_made_them(root: Path, fsynced: list[str]) -> None:
    root.mkdir(parents=True)
    objects = LocalObjects(root)
    objects.put("key", b"x")
    fsynced.clear()
    objects.sync(["key"])
    assert fsynced == [str(root), *above(root)]
    fsynced.clear()
    objects.sync(["key"])
    assert fsynced == [str(root)]


def test_a_root_that_was_removed_and_is_made_again_is_made_durable_again(
    objects: LocalObjects, root: Path, fsynced: list[str]
) -> None:
    objects.create("key", b"x")
    (root / "key").unlink()
    root.rmdir()
    fsynced.clear()
    objects.create("key", b"x")
    assert fsynced == [".tmp-", *above(root), str(root)]


def test_a_folder_above_that_may_not_be_read_is_passed_over(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir(parents=True)
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if path == str(root.parent):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    assert objects.create("key", b"x") is True


def test_sync_of_a_folder_that_is_gone_is_an_error(objects: LocalObjects) -> None:
    objects.put("a/key", b"x")
    with pytest.raises(UnavailableError, match=r"cannot sync .*/b: No such file"):
        objects.sync(["b/key"])


def test_a_file_system_that_cannot_fsync_folders_is_fine(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("key", b"x")
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    objects.sync(["key"])


@pytest.mark.parametrize("method", ["create", "put"])
@pytest.mark.parametrize(
    ("call", "number", "text"),
    [
        ("write", errno.ENOSPC, "No space left on device. The disk is full"),
        ("write", errno.EDQUOT, "quota"),
        ("fsync", errno.EIO, "Input/output error. The disk or its connection fails"),
        ("open", errno.EACCES, "Permission denied. Check who owns"),
        ("open", errno.EROFS, "mounted read-only"),
    ],
)
def test_a_failed_write_says_why_and_leaves_nothing(
    objects: LocalObjects,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: str,
    number: int,
    text: str,
) -> None:
    root.mkdir(parents=True)
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(UnavailableError, match=text) as caught:
        getattr(objects, method)("key", b"content")
    monkeypatch.undo()
    assert str(root / "key") in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert leftovers(root) == []


@pytest.mark.parametrize("interrupted", ["write", "link"])
def test_an_interrupt_leaves_no_temporary_file(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        objects.create("key", b"content")
    monkeypatch.undo()
    assert leftovers(root) == []


def test_a_failed_rename_leaves_no_temporary_file(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.EIO))
    with pytest.raises(UnavailableError):
        objects.put("key", b"content")
    assert leftovers(root) == []


def test_short_writes_are_gone_on_with(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    objects.put("key", memoryview(b"0123456789").cast("H"))
    assert objects.get("key") == b"0123456789"


def test_a_write_that_takes_nothing_is_an_error(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, content: 0)
    with pytest.raises(UnavailableError, match=r"accepts no more bytes"):
        objects.put("key", b"content")


def test_short_reads_are_gone_on_with(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put("key", b"0123456789")
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 3)))
    assert objects.get("key") == b"0123456789"


def test_a_link_that_was_made_though_its_reply_denies_it_is_ours(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def lie(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", lie)
    assert objects.create("key", b"ours") is True
    assert objects.get("key") == b"ours"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_told_as_such(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    with pytest.raises(UnavailableError, match=r"lacks hard links, which an exclusive create needs"):
        objects.create("key", b"x")
    assert leftovers(root) == []


def test_a_killed_process_leaves_only_what_no_listing_shows(objects: LocalObjects, root: Path) -> None:
    objects.put("runs/a/1", b"x")
    (root / "runs/a/.tmp-0123").write_bytes(b"half")
    (root / "runs/b").mkdir()
    (root / "runs/b/.tmp-4567").write_bytes(b"half")
    assert [row.key for row in objects.list("")] == ["runs/a/1"]
    assert objects.list("runs/a/.tmp-") == []
    assert objects.children("runs/") == ["a"]


def test_files_and_folders_that_vanish_during_a_listing_are_left_out(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ["a/1", "b/1", "c"]:
        objects.put(key, b"x")
    entries = objects._entries

    def vanish(folder: str) -> "list[os.DirEntry[str]]":
        found = entries(folder)
        if not folder:
            (root / "c").unlink()
            (root / "b/1").unlink()
            (root / "b").rmdir()
        return found

    monkeypatch.setattr(objects, "_entries", vanish)
    assert [row.key for row in objects.list("")] == ["a/1"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_unreadable_file_is_not_an_absent_one(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    objects.put("key", b"x")
    monkeypatch.setattr(os, "open", failing(number))
    with pytest.raises(UnavailableError, match=f"cannot read {root}/key: {os.strerror(number)}"):
        objects.get("key")


def test_an_unreadable_folder_is_not_an_empty_one(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put("a/key", b"x")
    monkeypatch.setattr(os, "scandir", failing(errno.EACCES))
    for ask in (objects.list, objects.children):
        with pytest.raises(UnavailableError, match=r"cannot list .*: Permission denied"):
            ask("a/")


@pytest.mark.parametrize("below", ["", "store"])
def test_a_root_that_is_a_file_or_below_one_is_an_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    objects = LocalObjects(tmp_path / "file" / below)
    calls: list[Callable[[], object]] = [
        lambda: objects.get("key"),
        lambda: objects.list(""),
        lambda: objects.list("a/b"),
        lambda: objects.children(""),
        lambda: objects.delete("key"),
        lambda: objects.put("key", b"x"),
        lambda: objects.create("a/key", b"x"),
    ]
    for call in calls:
        with pytest.raises(UnavailableError, match=r"file is a file, but a store is a folder"):
            call()


@pytest.mark.parametrize("key", ["", "/a", "a//b", "a/", "../a", "a/../b", "a/..", "./a", "a/.tmp-1"])
def test_keys_that_lead_elsewhere_are_refused(objects: LocalObjects, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: objects.get(key),
        lambda: objects.put(key, b""),
        lambda: objects.create(key, b""),
        lambda: objects.delete(key),
        lambda: objects.sync([key]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"is not a key"):
            call()


@pytest.mark.parametrize("prefix", ["/", "/a", "../", "a/../b"])
def test_prefixes_that_lead_elsewhere_are_refused(objects: LocalObjects, prefix: str) -> None:
    with pytest.raises(ValueError, match=r"is not a prefix"):
        objects.list(prefix)


def test_get_takes_one_open_one_fstat_and_one_read(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put("key", b"x" * 100_000)
    calls: list[str] = []

    def recording(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def record(*args: object) -> object:
            calls.append(name)
            return real(*args)

        return record

    for name in ["open", "fstat", "read", "stat", "lstat"]:
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    objects.get("key")
    assert calls == ["open", "fstat", "read"]


@pytest.mark.parametrize("place", ["{}", "file://{}", "local://{}", "{}/", "{}/x/.."])
def test_paths_and_file_urls_open_the_same_folder(tmp_path: Path, place: str) -> None:
    objects = open_objects(place.format(tmp_path))
    assert isinstance(objects, LocalObjects)
    assert objects.url == str(tmp_path)


def test_a_relative_path_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_objects("./ckpts").url == str(tmp_path / "ckpts")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_objects("~/ckpts").url == str(tmp_path / "ckpts")


@pytest.mark.parametrize("place", ["", "file://"])
def test_no_place_at_all_is_refused(place: str) -> None:
    with pytest.raises(InvalidInputError):
        open_objects(place)


# ---- what a collection asks of a disk


def unfinished(root: Path, where: str, *, age: float = 7200.0) -> Path:
    """A file of a writer that died so many seconds ago."""
    path = root / where / f".tmp-{uuid.uuid4().hex}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_files_of_dead_writers_are_found_in_every_folder_and_removed(objects: LocalObjects, root: Path) -> None:
    objects.put("chunks/ab/c", b"whole")
    dead = sorted(unfinished(root, where) for where in ("chunks/ab", "runs/a", "sessions", "."))
    named = [str(path.relative_to(root)) for path in dead]
    assert objects.leftovers(600, remove=False) == named
    assert all(path.exists() for path in dead)
    assert objects.leftovers(600, remove=True) == named
    assert leftovers(root) == [root / "chunks/ab/c"]
    assert objects.leftovers(600, remove=True) == []


@pytest.mark.parametrize("remove", [False, True])
def test_a_file_that_was_written_to_not_long_ago_is_no_leftover(
    objects: LocalObjects, root: Path, remove: bool
) -> None:
    young = unfinished(root, "chunks/ab", age=0)
    assert objects.leftovers(600, remove=remove) == []
    assert young.exists()


def test_the_age_of_a_leftover_goes_by_the_clock_that_stamps_files(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    young = unfinished(root, "chunks/ab", age=0)
    monkeypatch.setattr("ckptstore.objects.local.time.time", lambda: young.stat().st_mtime + 10_000)
    assert objects.leftovers(600, remove=True) == []


@pytest.mark.parametrize("name", [".tmp-backup", ".tmp-", f".tmp-{'A' * 32}", f".tmp-{'a' * 33}", f"x.tmp-{'a' * 32}"])
def test_files_of_other_programs_are_no_leftovers(objects: LocalObjects, root: Path, name: str) -> None:
    path = unfinished(root, "notes")
    path = path.rename(path.with_name(name))
    assert objects.leftovers(600, remove=True) == []
    assert path.exists()


def test_leftovers_are_not_looked_for_behind_links(objects: LocalObjects, root: Path, tmp_path: Path) -> None:
    elsewhere = unfinished(tmp_path, "elsewhere")
    root.mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert objects.leftovers(600, remove=True) == []
    assert elsewhere.exists()


def test_a_folder_that_is_not_there_has_no_leftovers(objects: LocalObjects, root: Path) -> None:
    assert objects.leftovers(600, remove=False) == []
    assert not root.exists()


def test_a_leftover_that_another_removes_meanwhile_is_fine(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = unfinished(root, "runs/a")
    unlink = os.unlink

    def twice(path: str) -> None:
        unlink(path)
        if path == str(dead):
            unlink(path)

    monkeypatch.setattr(os, "unlink", twice)
    assert objects.leftovers(600, remove=True) == [str(dead.relative_to(root))]


def test_a_writer_that_was_taken_for_dead_cannot_commit(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def stall(source: str, target: str) -> None:
        os.utime(source, (0, 0))
        assert len(LocalObjects(root).leftovers(600, remove=True)) == 1
        link(source, target)

    monkeypatch.setattr(os, "link", stall)
    with pytest.raises(UnavailableError, match="cannot create"):
        objects.create("runs/a/manifest", b"content")
    assert leftovers(root) == []


def test_leftovers_that_cannot_be_removed_are_told_of(
    objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(root, "runs/a")
    monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
    with pytest.raises(UnavailableError, match=r"cannot tidy up .*mounted read-only"):
        objects.leftovers(600, remove=True)


def test_what_is_deleted_together_is_gone_for_good_when_that_returns(
    objects: LocalObjects, root: Path, fsynced: list[str]
) -> None:
    for key in ("chunks/aa/1", "chunks/aa/2", "chunks/bb/3", "chunks/bb/4"):
        objects.put(key, b"x")
    fsynced.clear()
    objects.delete_many(["chunks/bb/3", "chunks/aa/1", "chunks/aa/2", "chunks/cc/never", "chunks/aa/gone"])
    assert leftovers(root) == [root / "chunks/bb/4"]
    assert fsynced == [str(root / "chunks/aa"), str(root / "chunks/bb")]


def test_a_deletion_that_may_not_last_is_an_error(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put("chunks/aa/1", b"x")
    monkeypatch.setattr("ckptstore.objects.local._fsync_folder", failing(errno.EIO))
    with pytest.raises(UnavailableError, match=r"cannot sync .*chunks/aa"):
        objects.delete_many(["chunks/aa/1"])


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("/dev/sda / ext4 rw 0 0\n", "ext4"),
        ("/dev/sda / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\n", "nfs4"),
        ("server:/x /data nfs4 rw 0 0\n/dev/sda / ext4 rw 0 0\n", "nfs4"),
        ("/dev/sda / ext4 rw 0 0\nserver:/x /dat nfs4 rw 0 0\n", "ext4"),
        ("/dev/sda / ext4 rw 0 0\nserver:/x /data/ckpts nfs4 rw 0 0\n", "nfs4"),
        ("/dev/sda / ext4 rw 0 0\nserver:/x /data/ckpts/below nfs4 rw 0 0\n", "ext4"),
        ("a /data nfs4 rw 0 0\nb /data ext4 rw 0 0\n", "ext4"),
        ("a /data ext4 rw 0 0\nb /data nfs4 rw 0 0\n", "nfs4"),
        ("a /data nfs4 rw 0 0\nb /data/ckpts xfs rw 0 0\n", "xfs"),
        ("a /elsewhere nfs4 rw 0 0\n", ""),
        ("", ""),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_nearest_mount_above(
    mounts: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(mounts))
    assert local._file_system("/data/ckpts") == kind


def test_a_mount_with_a_blank_in_its_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "/dev/sda / ext4 rw 0 0\nserver:/x /my\\040data nfs rw 0 0\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(mounts))
    assert local._file_system("/my data/ckpts") == "nfs"


def test_where_the_kernel_tells_no_mounts_none_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", failing(errno.ENOENT))
    assert local._file_system("/data") == ""


@pytest.mark.parametrize(("kind", "stale"), [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("ext4", False)])
def test_listings_of_network_file_systems_may_be_stale(
    kind: str, stale: bool, objects: LocalObjects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_file_system", lambda path: kind)
    said = f"{root} lies on a file system of type {kind}, which may keep a listing of a folder for a minute"
    assert objects.stale_listings() == (said if stale else "")


def test_the_file_system_is_that_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objects: LocalObjects
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr(local, "_file_system", lambda path: "nfs" if path == str(tmp_path / "real/store") else "ext4")
    assert LocalObjects(tmp_path / "link/store").stale_listings() != ""


@pytest.mark.parametrize("method", ["create", "put"])
def test_a_file_that_a_collection_takes_for_a_dead_writers_is_written_again(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As when the process was stopped for long just before it gave the file its name."""
    name = {"create": "link", "put": "replace"}[method]
    give_name = getattr(os, name)
    taken = 0

    def stalled(source: str, target: str) -> None:
        nonlocal taken
        if not taken:
            taken = len(objects.leftovers(-1, remove=True))
        give_name(source, target)

    monkeypatch.setattr(f"ckptstore.objects.local.os.{name}", stalled)
    getattr(objects, method)("runs/key", b"content")
    assert taken == 1
    assert objects.get("runs/key") == b"content"
    assert objects.leftovers(-1, remove=False) == []


def test_two_processes_may_tidy_up_at_the_same_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = LocalObjects(str(root))
    objects.put("a", b"x")
    opened = LocalObjects._open_new

    def open_and_lose(self: LocalObjects, folder: str, path: str) -> int:
        descriptor = opened(self, folder, path)
        Path(path).unlink()  # as the other does, which takes it for a leftover
        return descriptor

    monkeypatch.setattr(LocalObjects, "_open_new", open_and_lose)
    assert objects.leftovers(0, remove=True) == []
