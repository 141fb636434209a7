"""FsspecObjects and S3Objects: what goes wrong with a bucket, and how it is told; without a secret in it."""

import errno
import os
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import pytest

from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.objects import remote, s3
from ckptstore.objects.base import Bytes, Objects
from ckptstore.objects.memory import MemoryObjects
from ckptstore.objects.open import open_objects, self_test
from ckptstore.objects.remote import FsspecObjects
from ckptstore.objects.s3 import S3Objects
from tests.servers import SECRET, S3Server, certificate, moto_s3, no_aws_settings, seaweed_s3, through_s3fs

__all__ = ["certificate", "moto_s3", "no_aws_settings", "seaweed_s3", "through_s3fs"]

pytestmark = pytest.mark.usefixtures("through_s3fs")

FAST = {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 0}}


def every_call(objects: Objects) -> list[Callable[[], object]]:
    return [
        lambda: objects.get("key"),
        lambda: objects.list(""),
        lambda: objects.list("runs/a"),
        lambda: objects.children(""),
        lambda: objects.create("key", b"x"),
        lambda: objects.put("key", b"x"),
        lambda: objects.delete("key"),
        lambda: objects.delete_many(["key"]),
    ]


def client_error(code: str, status: int = 400) -> Exception:
    response: Any = {"Error": {"Code": code, "Message": "told"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "PutObject")  # type: ignore[no-any-return]


class Answering(S3Objects):
    """Its puts raise what a test gives, one after the other, then succeed."""

    def __init__(self, *answers: BaseException) -> None:
        super().__init__("s3://bucket/prefix")
        self.answers = list(answers)
        self.put_count = 0

    def _pipe(self, key: str, body: bytes | bytearray, **options: Any) -> None:
        self.put_count += 1
        if self.answers:
            raise self.answers.pop(0)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def test_constructing_makes_no_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Objects, "_file_system", lambda self: pytest.fail("constructing touched something"))
    assert open_objects("s3://bucket/prefix/").url == "s3://bucket/prefix"


def test_a_missing_bucket_is_an_error_of_every_call(moto_s3: S3Server) -> None:
    objects = open_objects("s3://no-such-bucket/prefix", moto_s3.storage_options)
    for call in every_call(objects):
        with pytest.raises(UnavailableError, match=r"The bucket 'no-such-bucket' does not exist") as caught:
            call()
        assert "s3://no-such-bucket/prefix" in str(caught.value)
        assert caught.value.__cause__ is not None


def test_a_missing_bucket_of_seaweedfs_is_no_empty_store(seaweed_s3: S3Server) -> None:
    # Only reads: SeaweedFS makes a missing bucket at the first put of a user who may.
    objects = open_objects("s3://no-such-bucket", seaweed_s3.storage_options)
    for call in every_call(objects)[:4]:
        with pytest.raises(UnavailableError, match=r"The bucket 'no-such-bucket' does not exist"):
            call()


@pytest.mark.parametrize(
    ("option", "text"), [("secret", "credentials are wrong"), ("key", "credentials are wrong")], ids=["secret", "key"]
)
def test_wrong_credentials_are_told_and_not_shown(seaweed_s3: S3Server, option: str, text: str) -> None:
    bucket = seaweed_s3.new_bucket()
    options = {**seaweed_s3.storage_options, option: "not-this-one"}
    objects = open_objects(f"s3://{bucket}", options)
    for call in every_call(objects):
        with pytest.raises(UnavailableError, match=text) as caught:
            call()
        assert SECRET not in str(caught.value)
        assert "not-this-one" not in f"{caught.value} {objects!r} {objects.url}"


def test_an_unreachable_server_is_an_error_of_every_call() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and never listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        options = {"key": "k", "secret": "s", "endpoint_url": endpoint, "config_kwargs": FAST}
        objects = open_objects("s3://bucket/prefix", options)
        for call in every_call(objects):
            with pytest.raises(UnavailableError, match=r"Could not connect to the endpoint URL.* Check the network"):
                call()


def test_a_server_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # not an option; a get tries 5 times 5 times
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        options = {
            "key": "k",
            "secret": "s",
            "endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "config_kwargs": {**FAST, "read_timeout": 0.1},
        }
        with pytest.raises(UnavailableError, match=r"cannot read s3://bucket/key: .*imeout"):
            open_objects("s3://bucket", options).get("key")


def test_no_credentials_at_all_is_told_with_the_ways_to_give_them(no_aws_settings: None) -> None:
    objects = open_objects("s3://bucket", {"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(UnavailableError, match=r"Unable to locate credentials. Give them as storage_options="):
        objects.get("key")


def test_a_profile_that_is_not_there_is_an_error(no_aws_settings: None) -> None:
    with pytest.raises(UnavailableError, match=r"absent-profile"):
        open_objects("s3://bucket", {"profile": "absent-profile"}).get("key")


def test_environment_variables_work_as_in_s3fs(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_s3.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-environment")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    objects = open_objects(f"s3://{moto_s3.new_bucket()}")
    objects.put("key", b"x")
    assert objects.get("key") == b"x"


def test_the_pool_is_large_unless_the_user_says_otherwise(moto_s3: S3Server) -> None:
    large = S3Objects("s3://bucket", moto_s3.storage_options)
    small = S3Objects("s3://bucket", {**moto_s3.storage_options, "config_kwargs": {"max_pool_connections": 3}})
    assert large._connected().fs.s3.meta.config.max_pool_connections == 64
    assert small._connected().fs.s3.meta.config.max_pool_connections == 3


def test_all_threads_share_one_file_system(moto_s3: S3Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    objects = S3Objects("s3://bucket", moto_s3.storage_options)
    with ThreadPoolExecutor(8) as pool:
        assert len({id(each) for each in pool.map(lambda _: objects._connected(), range(8))}) == 1


def test_a_forked_child_makes_its_own_file_system(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = S3Objects("s3://bucket", moto_s3.storage_options)
    before = objects._connected()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert objects._connected() is not before


def test_options_that_s3fs_does_not_take_are_told(no_aws_settings: None) -> None:
    with pytest.raises(UnavailableError, match=r"storage_options are not accepted: .*no_such_option"):
        open_objects("s3://bucket", {"no_such_option": 1}).get("key")


def test_s3fs_that_is_missing_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(protocol: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(UnavailableError, match=r'pip install "ckptstore\[s3\]"'):
        open_objects("s3://bucket").get("key")


@pytest.mark.parametrize(
    "answer",
    [
        lambda: FileExistsError("At least one of the pre-conditions"),
        lambda: caused(OSError(errno.EINVAL, "told"), client_error("PreconditionFailed", 412)),
        lambda: caused(OSError(errno.EINVAL, "told"), client_error("412", 412)),
    ],
    ids=["moto", "seaweedfs", "bare"],
)
def test_a_lost_race_is_no_error(answer: Callable[[], BaseException]) -> None:
    assert Answering(answer()).create("key", b"x") is False


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "409"])
def test_a_conflict_is_tried_again(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    objects = Answering(*(caused(OSError(errno.EBUSY, "told"), client_error(code, 409)) for _ in range(3)))
    assert objects.create("key", b"x") is True
    assert objects.put_count == 4


def test_conflicts_without_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    conflict = caused(OSError(errno.EBUSY, "told"), client_error("ConditionalRequestConflict", 409))
    objects = Answering(*[conflict] * 100)
    with pytest.raises(UnavailableError, match=r"cannot create s3://bucket/prefix/key"):
        objects.create("key", b"x")
    assert objects.put_count == remote.CONFLICT_TRIES


@pytest.mark.parametrize("code", ["SlowDown", "InternalError", "InvalidRequest", "SomethingNew"])
def test_other_refusals_of_a_create_are_errors(code: str) -> None:
    with pytest.raises(UnavailableError):
        Answering(caused(OSError(errno.EIO, "told"), client_error(code))).create("key", b"x")


def test_a_refusal_names_the_permission_and_the_key() -> None:
    refused = caused(PermissionError("Access Denied"), client_error("AccessDenied", 403))
    with pytest.raises(UnavailableError, match=r"cannot write s3://bucket/prefix/key: Access Denied.*s3:PutObject"):
        Answering(refused).put("key", b"x")


class AnsweringDeletes(S3Objects):
    """Its bulk deletes are answered with what a test gives, one after the other; it counts them and single deletes."""

    def __init__(self, *answers: "BaseException | dict[str, str]") -> None:
        super().__init__("s3://bucket/prefix")
        self.answers = list(answers)
        self.asked: list[list[str]] = []
        self.single: list[str] = []

    def _connected(self) -> Any:
        return SimpleNamespace(fs=self, root="bucket/prefix")

    def split_path(self, path: str) -> tuple[str, str, None]:
        return "bucket", "prefix", None

    def call_s3(self, method: str, *, Bucket: str, Delete: Any) -> Any:
        assert (method, Bucket, Delete["Quiet"]) == ("delete_objects", "bucket", True)
        self.asked.append([each["Key"] for each in Delete["Objects"]])
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        errors = [{"Key": f"prefix/{key}", "Code": code, "Message": "told"} for key, code in answer.items()]
        return {"ResponseMetadata": {}, **({"Errors": errors} if errors else {})}

    def delete(self, key: str) -> None:
        self.single.append(key)


def test_many_keys_are_deleted_by_one_request(moto_s3: S3Server) -> None:
    objects = S3Objects(f"s3://{moto_s3.new_bucket()}/prefix", moto_s3.storage_options)
    objects.put("key", b"x")
    seen: list[str] = []
    objects._connected().fs.s3.meta.events.register("before-call.s3", lambda model, **kwargs: seen.append(model.name))
    objects.delete_many(["key", *(f"absent-{number}" for number in range(999))])
    objects.delete_many([])
    assert seen == ["DeleteObjects"]
    assert objects.delete_batch == 1000


def test_a_bulk_delete_comes_with_a_checksum_that_s3_asks_for(moto_s3: S3Server) -> None:
    objects = S3Objects(f"s3://{moto_s3.new_bucket()}", moto_s3.storage_options)
    headers: dict[str, Any] = {}

    def remember(request: Any, **kwargs: Any) -> None:
        headers.update({name.lower(): value for name, value in request.headers.items()})

    objects._connected().fs.s3.meta.events.register("before-send.s3.DeleteObjects", remember)
    objects.delete_many(["key", "other"])
    assert any(name == "content-md5" or name.startswith("x-amz-checksum-") for name in headers)


def test_keys_that_are_refused_are_counted_and_the_first_is_named() -> None:
    objects = AnsweringDeletes({"b": "AccessDenied", "d": "AccessDenied"})
    with pytest.raises(UnavailableError) as caught:
        objects.delete_many(["a", "b", "c", "d"])
    assert "cannot delete s3://bucket/prefix/b: 2 of 4 keys were refused" in str(caught.value)
    assert "AccessDenied: told" in str(caught.value) and "s3:DeleteObject" in str(caught.value)
    assert len(objects.asked) == 1  # they would be refused again


def test_a_key_that_a_look_alike_calls_absent_is_deleted() -> None:
    objects = AnsweringDeletes({"a": "NoSuchKey"})
    objects.delete_many(["a", "b"])
    assert objects.asked == [["prefix/a", "prefix/b"]]


def test_only_keys_that_a_busy_server_left_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    objects = AnsweringDeletes({"b": "SlowDown", "c": "InternalError"}, {"c": "SlowDown"}, {})
    objects.delete_many(["a", "b", "c"])
    assert objects.asked == [["prefix/a", "prefix/b", "prefix/c"], ["prefix/b", "prefix/c"], ["prefix/c"]]


def test_keys_of_a_server_that_stays_busy_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    objects = AnsweringDeletes(*[{"b": "SlowDown"}] * 100)
    with pytest.raises(UnavailableError, match=r"prefix/b: 1 of 2 keys were refused, this one as SlowDown"):
        objects.delete_many(["a", "b"])
    assert len(objects.asked) == s3.DELETE_TRIES


@pytest.mark.parametrize("code", ["NotImplemented", "MethodNotAllowed", "501"])
def test_a_server_without_bulk_deletes_is_asked_for_each_key(code: str) -> None:
    objects = AnsweringDeletes(caused(OSError(errno.EIO, "told"), client_error(code, 501)))
    objects.delete_many(["a", "b"])
    assert objects.single == ["a", "b"]


def test_another_refusal_of_a_bulk_delete_is_an_error_and_no_reason_to_delete_one_by_one() -> None:
    objects = AnsweringDeletes(caused(PermissionError("Access Denied"), client_error("AccessDenied", 403)))
    with pytest.raises(UnavailableError, match=r"cannot delete s3://bucket/prefix/a: Access Denied.*s3:DeleteObject"):
        objects.delete_many(["a", "b"])
    assert objects.single == []


def test_an_answer_without_a_body_is_not_taken_for_a_delete(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = S3Objects("s3://bucket", moto_s3.storage_options)
    empty = {"ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {"content-length": "0"}}}
    monkeypatch.setattr(objects._connected().fs, "call_s3", lambda *args, **kwargs: empty)
    with pytest.raises(UnavailableError, match=r"not S3's"):
        objects.delete_many(["key", "other"])


def test_a_secret_in_the_cause_is_not_repeated() -> None:
    objects = Answering(OSError("could not send hush-hush to http://user:pass-word@proxy:1/"))
    objects._secrets = ["hush-hush"]
    with pytest.raises(UnavailableError) as caught:
        objects.put("key", b"x")
    assert "hush" not in str(caught.value) and "pass-word" not in str(caught.value)
    assert "http://proxy:1/" in str(caught.value)


def test_a_listing_that_is_cut_off_is_an_error(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = S3Objects("s3://bucket", moto_s3.storage_options)
    monkeypatch.setattr(objects._connected().fs, "call_s3", lambda *args, **kwargs: {"IsTruncated": True})
    with pytest.raises(UnavailableError, match=r"cut off"):
        objects.list("")


def test_what_others_put_under_a_folders_name_is_not_below_it(moto_s3: S3Server) -> None:
    bucket = moto_s3.new_bucket()
    for key in ["store", "store/", "storeroom/x", "store/runs/"]:
        moto_s3.client().put_object(Bucket=bucket, Key=key, Body=b"")
    objects = open_objects(f"s3://{bucket}/store", moto_s3.storage_options)
    assert objects.list("") == []


def test_one_get_is_one_request(moto_s3: S3Server) -> None:
    objects = S3Objects(f"s3://{moto_s3.new_bucket()}", moto_s3.storage_options)
    objects.put("key", b"x")
    client = objects._connected().fs.s3
    seen: list[str] = []
    client.meta.events.register("before-call.s3", lambda model, **kwargs: seen.append(model.name))
    objects.get("key")
    objects.get("absent")
    objects.list("absent/")
    assert seen == ["GetObject", "GetObject", "ListObjectsV2"]


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3a://bucket//"])
def test_slashes_at_the_end_make_no_difference(moto_s3: S3Server, url: str) -> None:
    bucket = moto_s3.new_bucket()
    open_objects(url.replace("bucket", bucket), moto_s3.storage_options).put("a/key", b"x")
    assert moto_s3.client().list_objects_v2(Bucket=bucket)["Contents"][0]["Key"] == "a/key"


@pytest.mark.parametrize("url", ["s3://", "s3:///", "nonsense://bucket/x", "simplecache::s3://bucket/x", "gs://"])
def test_urls_that_can_never_work_are_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidInputError):
        open_objects(url)


def test_credentials_in_the_url_of_a_bucket_are_refused_unseen() -> None:
    with pytest.raises(InvalidInputError, match=r"storage_options") as caught:
        open_objects("s3://AKIAKEY:hush@bucket/x")
    assert "hush" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


def test_credentials_in_other_urls_are_used_and_not_shown() -> None:
    objects = open_objects("sftp://user:hush@host/x")
    assert isinstance(objects, FsspecObjects)
    assert objects.url == "sftp://host/x"
    assert "hush" not in repr(objects)


class Ignoring(MemoryObjects):
    """A backend that ignores If-None-Match."""

    def create(self, key: str, content: Bytes) -> bool:
        self.put(key, content)
        return True


class Blind(MemoryObjects):
    """A backend whose listings lag behind."""

    def list(self, prefix: str) -> list[Any]:
        return []


@pytest.mark.parametrize(("backend", "text"), [(Ignoring, "ignores If-None-Match"), (Blind, "list does not show")])
def test_the_self_test_names_the_promise_that_is_broken(backend: type[MemoryObjects], text: str) -> None:
    url = f"memory://{os.urandom(4).hex()}"
    with pytest.raises(UnavailableError, match=text):
        self_test(backend(url))
    assert MemoryObjects(url).list("") == []
