"""The policies of docs/how-to/least-rights-on-s3.md let each kind of job do its work, and nothing else.

They are read from the document and given to users of a moto that enforces them: action and resource of every request.
moto does not enforce conditions. So what the conditions ask for is compared with the requests that were made: the
prefix of each listing, and the If-None-Match of each put of what may only be created. moto also answers that a missing
key is missing to whom AWS, or a look-alike, would say that it is forbidden; a test makes it answer so.
"""

import fnmatch
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptstore import CheckpointWarning, CorruptError, Store, UnavailableError
from ckptstore.cli import main
from ckptstore.format import session_key
from ckptstore.manifest import Session, encode
from ckptstore.objects.s3 import S3Objects
from ckptstore.writer import this_writer
from tests.servers import S3Server, running_moto

pytestmark = pytest.mark.usefixtures("through_s3fs")  # they look at the requests that botocore makes

DOCUMENT = (Path(__file__).parents[2] / "docs/how-to/least-rights-on-s3.md").read_text(encoding="utf-8")
POLICIES: dict[str, str] = dict(re.findall(r"^## ([^\n]+)\n.*?^```json\n(.*?)^```", DOCUMENT, re.M | re.S))
PREFIX = "ckpts"
REGION = "us-east-1"

botocore_exceptions = pytest.importorskip("botocore.exceptions")


def state(number: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((30_000,), number), "both": torch.arange(20_000)}


def saved_twice(store: Store) -> None:
    run = store.run("lstm")
    run.save(state(1.0), step=1, metrics={"loss": 2.0})
    run.save(state(2.0), step=2, metrics={"loss": 1.0})


def document_policy(heading: str, bucket: str) -> dict[str, Any]:
    policy = json.loads(POLICIES[heading].replace("my-bucket", bucket))
    assert isinstance(policy, dict)
    return policy


@dataclass
class Request:
    """One request that was sent to S3."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class User:
    """Somebody with keys: a store with these, and a client for what ckptstore would not ask for."""

    bucket: str
    options: dict[str, Any]
    client: Any
    policy: dict[str, Any]
    requests: list[Request] = field(default_factory=list)

    def store(self, **options: Any) -> Store:
        store = Store(f"s3://{self.bucket}/{PREFIX}", self.options, **options)
        assert isinstance(store._objects, S3Objects)
        events = store._objects._connected().fs.s3.meta.events
        events.register("before-send.s3", self._watch, unique_id=f"watch-{id(self)}")
        return store

    def _watch(self, request: Any, **_: Any) -> None:
        url = urllib.parse.urlsplit(request.url)
        headers = {
            name.lower(): value.decode() if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
        }
        key = urllib.parse.unquote(url.path).removeprefix(f"/{self.bucket}").removeprefix("/")
        self.requests.append(Request(request.method, key, dict(urllib.parse.parse_qsl(url.query)), headers))

    def held(self) -> list[str]:
        rows = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{PREFIX}/").get("Contents", [])
        return [row["Key"].removeprefix(f"{PREFIX}/") for row in rows]

    def is_refused(self, operation: str, key: str, **request: Any) -> bool:
        try:
            getattr(self.client, operation)(Bucket=self.bucket, Key=key, **request)
        except botocore_exceptions.ClientError as error:
            assert error.response["Error"]["Code"] == "AccessDenied"
            return True
        return False


@dataclass
class Iam:
    """A server that asks who somebody is and what they may do."""

    server: S3Server
    administrator: dict[str, str]
    names: Iterator[int]

    def client(self, service: str, keys: dict[str, str]) -> Any:
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.server.endpoint_url,
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            region_name=REGION,
        )

    def user(self, bucket: str, policy: dict[str, Any], keys: dict[str, str] | None = None) -> User:
        if keys is None:
            iam, name = self.client("iam", self.administrator), f"user-{next(self.names)}"
            iam.create_user(UserName=name)
            iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=json.dumps(policy))
            keys = iam.create_access_key(UserName=name)["AccessKey"]
        options = {
            "key": keys["AccessKeyId"],
            "secret": keys["SecretAccessKey"],
            "client_kwargs": {"endpoint_url": self.server.endpoint_url, "region_name": REGION},
        }
        return User(bucket, options, self.client("s3", keys), policy)


@pytest.fixture(scope="module")
def iam(no_aws_settings: None) -> Iterator[Iam]:
    with running_moto() as server:
        anybody = Iam(server, {"AccessKeyId": "anybody", "SecretAccessKey": "anything"}, iter(range(1000)))
        client = anybody.client("iam", anybody.administrator)
        client.create_user(UserName="administrator")
        everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        client.put_user_policy(UserName="administrator", PolicyName="all", PolicyDocument=json.dumps(everything))
        keys = client.create_access_key(UserName="administrator")["AccessKey"]
        # From now on every request is checked.
        url = f"{server.endpoint_url}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, b"0", {"Content-Type": "text/plain"})).close()
        yield Iam(server, keys, anybody.names)


@pytest.fixture
def bucket(iam: Iam) -> str:
    name = f"policies-{next(iam.names)}"
    iam.client("s3", iam.administrator).create_bucket(Bucket=name)
    return name


@pytest.fixture
def owner(iam: Iam, bucket: str) -> User:
    """Somebody who may do everything, to set the scene."""
    return iam.user(bucket, {}, iam.administrator)


def user_of(heading: str) -> Callable[[Iam, str], Iterator[User]]:
    def user(iam: Iam, bucket: str) -> Iterator[User]:
        found = iam.user(bucket, document_policy(heading, bucket))
        yield found
        require_conditions(found)

    return user


reader = pytest.fixture(user_of("A reader"), name="reader")
writer = pytest.fixture(user_of("A writer"), name="writer")
collector = pytest.fixture(user_of("A collector"), name="collector")


def require_conditions(user: User) -> None:
    """What moto does not look at: after every test, each request of the user met the conditions of the policies."""
    [listing] = [each for each in user.policy["Statement"] if each["Action"] == "s3:ListBucket"]
    pattern = listing["Condition"]["StringLike"]["s3:prefix"]
    prefixes = [request.query.get("prefix", "") for request in user.requests if "list-type" in request.query]
    assert all(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes), prefixes
    [created] = document_policy("What may only be created", user.bucket)["Statement"]
    assert created["Condition"] == {"Null": {"s3:if-none-match": "true"}}
    patterns = [resource.partition(f"{user.bucket}/")[2] for resource in created["Resource"]]
    for request in user.requests:
        if request.method == "PUT" and any(fnmatch.fnmatchcase(request.key, each) for each in patterns):
            assert request.headers.get("if-none-match") == "*", request.key


def refused(permission: str) -> Any:
    return pytest.raises(UnavailableError, match=f"lack the permission {permission} for it")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(user: User, *words: str) -> int:
        user.store()  # s3fs keeps one client for the same options, so from here on the command's requests are seen
        monkeypatch.setenv("CKPTSTORE_URL", f"s3://{user.bucket}/{PREFIX}")
        monkeypatch.setenv("CKPTSTORE_STORAGE_OPTIONS", json.dumps(user.options))
        return main(list(words))

    return call


def damage(owner: User, step: int) -> str:
    """Cut off a chunk that only this step needs; its key."""
    manifest = owner.store().run("lstm").checkpoint(step)._manifest
    [key] = [ref.key for ref in manifest.chunks if ref.raw == 120_000]
    owner.client.put_object(Bucket=owner.bucket, Key=f"{PREFIX}/{key}", Body=b"cut off")
    return key


def test_the_document_has_the_policies() -> None:
    assert list(POLICIES) == ["A reader", "A writer", "A collector", "What may only be created"]


def test_the_server_refuses_who_has_no_rights(iam: Iam, bucket: str) -> None:
    elsewhere = {"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::elsewhere/*"}
    nobody = iam.user(bucket, {"Version": "2012-10-17", "Statement": [elsewhere]})
    with refused("s3:ListBucket"):
        nobody.store().runs()
    with refused("s3:GetObject"):
        nobody.store().run("lstm").restore(state())


def test_a_key_that_is_there_and_may_not_be_read_does_not_pass_for_missing(iam: Iam, bucket: str, owner: User) -> None:
    saved_twice(owner.store())
    policy = document_policy("A reader", bucket)
    policy["Statement"] = [each for each in policy["Statement"] if each["Action"] == "s3:ListBucket"]
    with refused("s3:GetObject"):
        iam.user(bucket, policy).store().run("lstm").restore(state())


# ---- a reader


def test_a_reader_restores_loads_and_verifies(owner: User, reader: User) -> None:
    saved_twice(owner.store())
    store = reader.store()
    run = store.run("lstm")
    found = run.restore(state())
    assert found is not None
    assert found.step == 2
    assert torch.equal(run.load(1, expect=run.checkpoint(1).digest)["w"], state(1.0)["w"])
    assert store.verify().ok
    assert store.usage().runs["lstm"].checkpoints == 2


def test_a_reader_uses_the_commands_that_read(
    owner: User, reader: User, cli: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved_twice(owner.store())
    for words in (
        ("ls",),
        ("ls", f"s3://{reader.bucket}/{PREFIX}/lstm"),
        ("show", "lstm@2"),
        ("du",),
        ("verify",),
        ("verify", "--quick"),
        ("export", "lstm@1", str(tmp_path / "out.pt")),
        ("gc", "--dry-run"),
        ("prune", "--all", "--keep-last", "1", "--dry-run"),
    ):
        assert cli(reader, *words) == 0, (words, capsys.readouterr().err)


def test_a_reader_sees_a_first_start_where_there_is_no_store(reader: User) -> None:
    assert reader.store().run("lstm").restore(state()) is None


def test_a_reader_goes_back_from_damage_that_it_may_not_mark(owner: User, reader: User) -> None:
    saved_twice(owner.store())
    damage(owner, 2)
    with pytest.warns(CheckpointWarning, match="Going back to step 1"):
        found = reader.store().run("lstm").restore(state())
    assert found is not None
    report = reader.store().verify()
    assert not report.ok
    assert not report.marked
    assert not [key for key in owner.held() if key.startswith("condemned/")]


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.run("lstm").save(state(3.0), step=3),
        lambda store: store.run("lstm").save(state(3.0), step=2, replace=True),
        lambda store: store.run("lstm").save_async(state(3.0), step=3).result(),
        lambda store: store.run("lstm").delete(1),
        lambda store: store.run("lstm").tag(1, "best"),
        lambda store: store.prune(keep_last=1),
        lambda store: store.collect(),
    ],
    ids=["save", "replace", "save_async", "delete", "tag", "prune", "collect"],
)
def test_a_reader_cannot_change_anything(owner: User, reader: User, act: Callable[[Store], Any]) -> None:
    saved_twice(owner.store())
    before = owner.held()
    with refused("s3:PutObject"):
        act(reader.store())
    assert owner.held() == before
    assert reader.store().verify().ok


def test_a_reader_cannot_make_a_store(owner: User, reader: User) -> None:
    with refused("s3:PutObject"):
        reader.store().run("lstm").save(state(), step=1)
    assert not owner.held()


def test_a_reader_that_examines_a_store_is_told_which_permission_saves_need(owner: User, reader: User) -> None:
    saved_twice(owner.store())
    [problem] = [found for found in reader.store().examine() if found.level == "problem"]
    assert "s3:PutObject" in problem.what


# ---- a writer


def test_a_writer_makes_a_store_and_saves_in_every_way(writer: User, owner: User) -> None:
    run = writer.store().run("lstm")
    first = run.save(state(1.0), step=1)
    assert run.save_async(state(2.0), step=2).result().new_bytes < first.new_bytes
    replaced = run.save(state(3.0), step=2, replace=True)
    assert run.checkpoint(2) == replaced
    assert torch.equal(run.load(2)["w"], state(3.0)["w"])
    small = writer.store(codec="small").run("lstm")
    w = torch.randn(30_000, generator=torch.Generator().manual_seed(1))
    small.save({"w": w}, step=3)
    assert small.save({"w": w * 1.0001}, step=4)._manifest.format == 2
    assert run.restore({"w": w}) is not None
    left = {key.partition("/")[0] for key in owner.held()}
    assert left == {"ckptstore.json", "chunks", "deltas", "runs"}  # sessions and scratch are tidied up


def test_a_writer_finds_that_all_is_well_and_dry_runs(writer: User) -> None:
    saved_twice(writer.store())
    assert not [found for found in writer.store().examine() if found.level == "problem"]
    assert writer.store().verify().ok
    assert writer.store().collect(dry_run=True).checkpoints == 2


def test_a_writer_marks_damage_and_saves_over_it(writer: User, owner: User) -> None:
    saved_twice(writer.store())
    key = damage(owner, 2)
    run = writer.store().run("lstm")
    with pytest.raises(CorruptError):
        run.load(2)
    assert [each for each in owner.held() if each.startswith("condemned/")]
    again = run.save(state(2.0), step=3)
    assert key not in [ref.key for ref in again._manifest.chunks]
    assert torch.equal(run.load(3)["w"], state(2.0)["w"])


def test_a_writer_deletes_a_step_by_a_tombstone(writer: User, owner: User) -> None:
    saved_twice(writer.store())
    before = owner.held()
    writer.store().run("lstm").delete(1)
    assert writer.store().run("lstm").steps() == [2]
    assert owner.held() == before


def test_a_writer_that_deletes_a_step_with_a_tag_is_told_what_it_lacks(writer: User, owner: User) -> None:
    saved_twice(writer.store())
    owner.store().run("lstm").tag(1, "best")
    with refused("s3:DeleteObject"):
        writer.store().run("lstm").delete(1)
    assert writer.store().run("lstm").steps() == [2]


def test_a_writer_cannot_delete_what_others_need(writer: User, owner: User) -> None:
    saved_twice(writer.store())
    damage(owner, 2)
    assert not writer.store().verify().ok  # makes a list of what is condemned
    owner.store().run("lstm").tag(1, "best")
    for key in owner.held():
        assert writer.is_refused("delete_object", f"{PREFIX}/{key}"), key


def test_a_writer_cannot_put_beside_the_store_or_into_its_tags(writer: User) -> None:
    assert writer.is_refused("put_object", "others/file", Body=b"x")
    assert writer.is_refused("put_object", f"{PREFIX}/tags/lstm/file", Body=b"x")
    assert not writer.is_refused("put_object", f"{PREFIX}/scratch/file", Body=b"x")
    with refused("s3:PutObject"):
        saved_twice(writer.store())
        writer.store().run("lstm").tag(1, "best")


def test_a_writer_cannot_collect(writer: User, owner: User) -> None:
    saved_twice(writer.store())
    writer.store().run("lstm").delete(2)
    before = {key for key in owner.held() if key.startswith("chunks/")}
    with refused("s3:DeleteObject"):
        writer.store().collect()
    assert {key for key in owner.held() if key.startswith("chunks/")} == before


# ---- a collector


@pytest.fixture(autouse=True)
def one_key_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS looks up the right to delete for each key of a DeleteObjects; moto asks for it on the bucket as a whole."""
    monkeypatch.setattr(S3Objects, "delete_batch", 1)


def test_a_collector_prunes_and_collects(owner: User, collector: User) -> None:
    saved_twice(owner.store())
    store = collector.store()
    assert [row.step for row in store.prune(keep_last=1).removed] == [1]
    assert store.collect().deleted == 1
    assert store.collect().garbage == 0
    assert not [key for key in owner.held() if key.startswith(("condemned/", "scratch/", "sessions/"))]
    assert store.verify().ok
    assert torch.equal(store.run("lstm").load(2)["w"], state(2.0)["w"])


def test_a_collector_uses_the_commands_for_it(
    owner: User, collector: User, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    saved_twice(owner.store())
    for words in (
        ("rm", "lstm@1"),
        ("prune", "--all", "--keep-last", "1"),
        ("gc",),
        ("repair",),
        ("doctor",),
        ("verify",),
    ):
        assert cli(collector, *words) == 0, (words, capsys.readouterr())


def test_a_collector_fences_saves_that_died(owner: User, collector: User) -> None:
    saved_twice(owner.store())
    session = Session(save=32 * "a", run="lstm", step=9, writer=this_writer(), opened="2026-11-25T01:02:03Z", beat=0)
    owner.store()._objects.put(session_key(session.save), encode(session))
    assert [row.step for row in collector.store().collect(grace=0).fenced] == [9]
    assert session_key(session.save) not in owner.held()


def test_a_collector_tags_and_untags(owner: User, collector: User) -> None:
    saved_twice(owner.store())
    run = collector.store().run("lstm")
    run.tag(1, "best")
    run.tag(2, "last")
    assert run.tags() == {1: ("best",), 2: ("last",)}
    run.untag(1, "best")
    run.delete(2)
    assert not [key for key in owner.held() if key.startswith("tags/")]


def test_a_collector_verifies_marks_and_repairs(owner: User, collector: User) -> None:
    saved_twice(owner.store())
    damage(owner, 2)
    report = collector.store().verify()
    assert not report.ok
    assert report.marked
    owner.store().run("other").save(state(2.0), step=0)  # uploads a good copy
    assert [row.step for row in collector.store().repair().repaired] == [2]
    assert torch.equal(collector.store().run("lstm").load(2)["w"], state(2.0)["w"])


def test_a_collector_may_delete_all_but_the_marker(owner: User, collector: User) -> None:
    """Such as tombstones, a week after a delete, and deltas."""
    store = owner.store(codec="small")
    w = torch.randn(30_000, generator=torch.Generator().manual_seed(1))
    for step in (1, 2):
        store.run("lstm").save({"w": w * (1 + step / 10_000)}, step=step)
        store.run("lstm").tag(step, "best")
    refusals = {key for key in owner.held() if collector.is_refused("delete_object", f"{PREFIX}/{key}")}
    assert refusals == {"ckptstore.json"} == set(owner.held())


def test_a_collector_cannot_save_or_touch_the_marker(owner: User, collector: User) -> None:
    saved_twice(owner.store())
    with refused("s3:PutObject"):
        collector.store().run("lstm").save(state(3.0), step=3)
    assert collector.is_refused("put_object", f"{PREFIX}/chunks/aa/file", Body=b"x")
    assert collector.is_refused("put_object", f"{PREFIX}/ckptstore.json", Body=b"x")
    assert collector.is_refused("delete_object", f"{PREFIX}/ckptstore.json")
    assert owner.store().run("lstm").steps() == [1, 2]


# ---- a server that refuses what is not there


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a get of a key that is not there be refused, as without the right to list it."""
    from s3fs import S3FileSystem

    ask = S3FileSystem._call_s3

    async def answer(self: Any, method: str, *arguments: Any, **request: Any) -> Any:
        try:
            return await ask(self, method, *arguments, **request)
        except FileNotFoundError:
            if method != "get_object":
                raise
            body = {"Error": {"Code": "AccessDenied", "Message": "Access Denied"}}
            raise PermissionError("Access Denied") from botocore_exceptions.ClientError(body, "GetObject")

    monkeypatch.setattr(S3FileSystem, "_call_s3", answer)


def test_a_writer_makes_a_store_where_missing_keys_are_refused(secretive: None, writer: User) -> None:
    saved_twice(writer.store())
    assert writer.store().run("lstm").restore(state()) is not None


def test_a_first_start_is_seen_where_missing_keys_are_refused(secretive: None, reader: User) -> None:
    assert reader.store().run("lstm").restore(state()) is None
