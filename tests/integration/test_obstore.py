"""ObstoreObjects: what its requests look like on the wire, and what it makes of refusals, time-outs and forks."""

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

import ckptstore
from ckptstore.errors import UnavailableError
from ckptstore.objects import obstore as module
from ckptstore.objects import obstore_options
from ckptstore.objects.obstore import ObstoreObjects
from ckptstore.objects.s3 import S3Objects
from tests.fault.proxy import Fault, FaultProxy, Request, error_page, refusal, shorten_answer
from tests.servers import KEY, SECRET, S3Server

KMS_KEY = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
PUT, GET = ("put", "key"), ("get", "key")


@pytest.fixture(scope="module")
def proxy(moto_s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto_s3.endpoint_url) as running:
        yield running


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy) -> None:
    """No faults yet, short waits, and gets without TLS, so that the proxy sees them."""
    proxy.heal()
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(obstore_options, "CHECKED_ON_THE_WAY", ("http",))


@pytest.fixture
def through(moto_s3: S3Server, proxy: FaultProxy) -> Callable[..., ObstoreObjects]:
    """Objects in a bucket of their own, through a proxy that sees every request."""

    def opened(**options: Any) -> ObstoreObjects:
        client = {"endpoint_url": proxy.endpoint_url, "region_name": "us-east-1"}
        given = {"key": KEY, "secret": SECRET, "client_kwargs": client, **options}
        return ObstoreObjects(f"s3://{moto_s3.new_bucket()}/some/prefix", given)

    return opened


def sent(proxy: FaultProxy, operation: str) -> tuple[Request, dict[str, str]]:
    """The one request of this kind, and its headers; the client must have been obstore."""
    [request] = [each for each in proxy.requests if each.operation == operation]
    headers = dict(re.findall(r"(?m)^([\w-]+): ([^\r]*)\r$", request.head.decode("latin-1")))
    lower = {name.lower(): value for name, value in headers.items()}
    assert "object_store" in lower["user-agent"]
    return request, lower


def test_a_put_and_a_get_are_one_request_each(through: Callable[..., ObstoreObjects], proxy: FaultProxy) -> None:
    objects = through()
    content = os.urandom(9 * 2**20)
    objects.put("key", content)
    assert objects.get("key") == content
    assert objects.get("absent") is None
    assert [each.operation for each in proxy.requests] == ["put", "get", "get"]
    sent(proxy, "put")


def test_clients_are_made_once_for_a_file_system_and_anew_for_one_that_is_made_anew(
    through: Callable[..., ObstoreObjects],
) -> None:
    objects = through()
    objects.put("key", b"1")
    again = ObstoreObjects(objects.url, objects._options)
    again.put("key", b"2")
    assert again._stores is objects._stores
    s3fs.S3FileSystem.clear_instance_cache()  # as one does after credentials in the environment have changed
    anew = ObstoreObjects(objects.url, objects._options)
    anew.put("key", b"3")
    assert anew._stores is not objects._stores


def test_a_get_without_tls_is_left_to_s3fs_which_checks_it(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    objects = through()
    objects.put("key", b"some content")
    proxy.play(shorten_answer, *GET)
    assert objects.get("key") == b"some content"
    assert [b"object_store" in each.head for each in proxy.requests] == [True, False, False]


def test_what_its_caller_checks_is_got_by_obstore_without_tls_too(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    objects = through()
    objects.put("key", b"some content")
    assert objects.get_unchecked("key") == b"some content"
    assert objects.get_unchecked("absent") is None
    assert [each.operation for each in proxy.requests] == ["put", "get", "get"]
    assert all(b"object_store" in each.head for each in proxy.requests)


def test_a_chunk_that_the_way_has_shortened_is_got_again_by_s3fs_which_checks_it(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    objects = through()
    run = ckptstore.Store(objects).run("run")
    run.save({"weight": torch.arange(100_000)}, step=1)
    proxy.heal()
    proxy.play(shorten_answer, "get", "chunks/", times=2)  # for s3fs, too: the checksum that comes along tells it
    assert torch.equal(run.load(1)["weight"], torch.arange(100_000))
    gets = [each for each in proxy.requests if each.operation == "get" and "/chunks/" in each.key]
    assert [b"object_store" in each.head for each in gets] == [True, False, False]
    assert objects.list("condemned/") == []


def test_stores_at_the_same_place_share_their_connections(through: Callable[..., ObstoreObjects]) -> None:
    first = through()
    second = ObstoreObjects(first.url, first._options)
    for objects in (first, second):
        objects.connect()
    assert first._stores is not None and second._stores is first._stores


@pytest.mark.parametrize("bucket", ["arn:aws:s3:eu-west-1:123456789012:accesspoint/team", "team--euw1-az1--x-s3"])
def test_buckets_that_are_signed_in_ways_of_their_own_are_left_to_s3fs(moto_s3: S3Server, bucket: str) -> None:
    objects = ObstoreObjects(f"s3://{bucket}/ckpts", moto_s3.storage_options)
    objects.connect()
    assert objects._stores is None


def test_a_client_that_adapts_to_throttling_is_left_to_s3fs(through: Callable[..., ObstoreObjects]) -> None:
    objects = through(config_kwargs={"retries": {"mode": "adaptive"}})
    objects.put("key", b"x")
    assert objects._stores is None


def test_a_create_is_left_to_s3fs(through: Callable[..., ObstoreObjects], proxy: FaultProxy) -> None:
    assert through().create("key", b"x") is True
    [request] = proxy.requests
    assert request.operation == "create"
    assert b"object_store" not in request.head


def test_puts_carry_a_checksum_unless_that_is_turned_off(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy
) -> None:
    through().put("key", b"x")
    _, headers = sent(proxy, "put")
    assert "x-amz-checksum-sha256" in headers
    assert "x-amz-sdk-checksum-algorithm" in headers["authorization"]  # it is signed, as S3 wants all such headers
    proxy.heal()
    through(config_kwargs={"request_checksum_calculation": "when_required"}).put("key", b"x")
    assert not [name for name in sent(proxy, "put")[1] if "checksum" in name]


def test_encryption_and_class_go_along_with_every_put(
    through: Callable[..., ObstoreObjects], moto_s3: S3Server
) -> None:
    wishes = {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": KMS_KEY,
        "BucketKeyEnabled": True,
        "StorageClass": "STANDARD_IA",
    }
    objects = through(s3_additional_kwargs=wishes)
    objects.put("put", b"x")
    objects.create("created", b"x")
    bucket = objects.url.split("/")[2]
    for key in ("put", "created"):
        head = moto_s3.client().head_object(Bucket=bucket, Key=f"some/prefix/{key}")
        assert {name: head[name] for name in wishes} == wishes
    assert objects.get("put") == b"x"


def test_whoever_asks_pays_if_they_say_so(through: Callable[..., ObstoreObjects], proxy: FaultProxy) -> None:
    objects = through(requester_pays=True)
    objects.put("key", b"x")
    objects.get("key")
    assert [sent(proxy, each)[1]["x-amz-request-payer"] for each in ("put", "get")] == ["requester", "requester"]


def test_nothing_is_signed_for_a_public_bucket(through: Callable[..., ObstoreObjects], proxy: FaultProxy) -> None:
    through(anon=True, key=None, secret=None).put("key", b"x")
    assert "authorization" not in sent(proxy, "put")[1]


# Names that no other test has: fsspec hands out the same file system again for the same options.
@pytest.mark.parametrize("profile", ["my-keys", "my-role"])
def test_profiles_and_assumed_roles_sign_as_the_aws_tools_do(
    moto_s3: S3Server, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    place = f"region=us-east-1\nendpoint_url={proxy.endpoint_url}\n"
    (tmp_path / "config").write_text(
        f"[profile my-keys]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n{place}"
        f"[profile my-role]\nrole_arn=arn:aws:iam::123456789012:role/trainer\nsource_profile=my-keys\n{place}"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    objects = ObstoreObjects(f"s3://{moto_s3.new_bucket()}", {"profile": profile})
    objects.put("key", b"x")
    _, headers = sent(proxy, "put")
    assert (f"Credential={KEY}/" in headers["authorization"]) == (profile == "my-keys")
    assert ("x-amz-security-token" in headers) == (profile == "my-role")


def test_a_certificate_authority_of_ones_own_is_left_to_s3fs_unless_obstore_trusts_it_too(
    seaweed_s3: S3Server, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, options = seaweed_s3.new_bucket(), seaweed_s3.storage_options_of_https
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate[0])
    alone = ObstoreObjects(f"s3://{bucket}", options)
    alone.put("key", b"x")
    assert alone._stores is None
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    beside = ObstoreObjects(f"s3://{bucket}", options)
    assert beside.get("key") == b"x"
    assert beside._stores is not None and beside._stores.gets_are_protected


@pytest.mark.parametrize("act", [PUT, GET], ids=["put", "get"])
def test_a_bucket_in_another_region_is_left_to_s3fs_which_follows(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy, act: tuple[str, str]
) -> None:
    objects = through()
    objects.put("key", b"x")
    proxy.play(refusal(301, "PermanentRedirect"), *act)
    objects.put("key", b"y")
    assert objects.get("key") == b"y"
    assert objects._stores is None


def test_a_refusal_tells_what_s3_said_and_names_the_permission(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy
) -> None:
    objects = through()
    proxy.play(refusal(403, "AccessDenied"), *PUT)
    with pytest.raises(UnavailableError, match=r"^cannot write s3://\S+/key: AccessDenied\. .*s3:PutObject") as caught:
        objects.put("key", b"x")
    assert caught.value.__cause__ is not None
    assert proxy.count(*PUT) == 1  # it would be refused again


def test_a_missing_bucket_is_no_missing_key(moto_s3: S3Server) -> None:
    objects = ObstoreObjects("s3://no-such-bucket/prefix", moto_s3.storage_options)
    acts: list[Callable[[], object]] = [lambda: objects.get("key"), lambda: objects.put("key", b"x")]
    for act in acts:
        with pytest.raises(UnavailableError, match=r"The bucket 'no-such-bucket' does not exist"):
            act()


def test_a_missing_key_is_told_from_a_page_that_says_404(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy
) -> None:
    objects = through()
    proxy.play(error_page(404), *GET)
    with pytest.raises(UnavailableError, match=r"the server answered 404"):
        objects.get("key")
    assert objects.get("key") is None


def test_a_page_in_place_of_an_object_is_asked_for_again(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy
) -> None:
    objects = through()
    objects.put("key", b"x")
    proxy.play(error_page(200), *GET, times=3)
    assert objects.get("key") == b"x"


@pytest.mark.parametrize("fault", [refusal(503, "SlowDown"), error_page(502)], ids=["S3", "a page"])
def test_a_busy_server_is_asked_as_often_as_through_s3fs(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy, fault: Fault
) -> None:
    objects = through(config_kwargs={"retries": {"max_attempts": 1}})
    proxy.play(fault, times=None)
    with pytest.raises(
        UnavailableError, match=r"cannot write s3://\S+/key: (SlowDown|the server answered 502)\. Check"
    ):
        objects.put("key", b"x")
    assert proxy.count(*PUT) == 10


@pytest.mark.parametrize("option", ["secret", "key"])
def test_wrong_credentials_are_told_and_not_shown(seaweed_s3: S3Server, option: str) -> None:
    options = {**seaweed_s3.storage_options, option: "not-this-one"}
    objects = ObstoreObjects(f"s3://{seaweed_s3.new_bucket()}", options)
    acts: list[Callable[[], object]] = [lambda: objects.get("key"), lambda: objects.put("key", b"x")]
    for act in acts:
        with pytest.raises(UnavailableError, match="credentials are wrong") as caught:
            act()
        assert SECRET not in str(caught.value)
        assert "not-this-one" not in str(caught.value)


def test_no_credentials_at_all_are_told_with_the_ways_to_give_them(no_aws_settings: None) -> None:
    objects = ObstoreObjects("s3://bucket", {"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(UnavailableError, match=r"Unable to locate credentials. Give them as storage_options="):
        objects.put("key", b"x")


def test_credentials_that_can_no_longer_be_had_are_told(
    moto_s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expired() -> dict[str, Any]:
        raise RuntimeError("the session of your single sign-on has ended")

    monkeypatch.setattr("ckptstore.objects.obstore_options._credentials", lambda fs: expired)
    objects = ObstoreObjects(f"s3://{moto_s3.new_bucket()}", moto_s3.storage_options)
    with pytest.raises(UnavailableError, match=r"single sign-on has ended.* credentials are wrong or expired"):
        objects.put("key", b"x")


def test_an_unreachable_server_is_told_by_what_the_system_says() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and never listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        options = {
            "key": "k",
            "secret": "s",
            "endpoint_url": endpoint,
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
        with pytest.raises(UnavailableError, match=rf"Connection refused, asking {endpoint}\. Check the network"):
            ObstoreObjects("s3://bucket/prefix", options).get("key")


def test_a_put_of_a_server_that_never_answers_ends(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.objects.obstore_options.WHOLE_PUT", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = {"read_timeout": 0.1, "retries": {"max_attempts": 0}}
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = {"key": "k", "secret": "s", "endpoint_url": endpoint, "config_kwargs": config}
        with pytest.raises(
            UnavailableError, match=r"cannot write s3://bucket/key: timeout: there was no answer in time"
        ):
            ObstoreObjects("s3://bucket", options).put("key", b"x")


def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(
    through: Callable[..., ObstoreObjects], proxy: FaultProxy
) -> None:
    objects = through()
    objects.put("key", b"x")
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which ends it, should it wait
        others = ObstoreObjects(objects.url, objects._options)
        os._exit(0 if objects.get("key") == others.get("key") == b"x" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert objects.get("key") == b"x"
    assert [b"object_store" in each.head for each in proxy.requests] == [True, False, False, True]


def test_it_is_s3fs_that_lists_and_deletes(through: Callable[..., ObstoreObjects], proxy: FaultProxy) -> None:
    objects = through()
    objects.list("")
    objects.children("")
    objects.delete("key")
    assert len(proxy.requests) == 3
    assert not [each for each in proxy.requests if b"object_store" in each.head]
    for name in ("list", "children", "delete", "delete_many", "create"):
        assert getattr(ObstoreObjects, name) is getattr(S3Objects, name)
