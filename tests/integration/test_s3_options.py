"""What teams need of S3 passes through `storage_options`: encryption, classes, roles, checksums, requester pays."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.objects.s3 import S3Objects
from tests.servers import KEY, SECRET, S3Server

pytestmark = pytest.mark.usefixtures("through_s3fs")  # they look at the requests that botocore makes

KMS_KEY = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def saved(server: S3Server, bucket: str, options: dict[str, Any]) -> ckptstore.Run:
    """A run with a checkpoint that was saved twice, and restored."""
    run = ckptstore.Store(f"s3://{bucket}/ckpts", options).run("run")
    run.save({"x": torch.arange(30_000)}, step=1)
    run.save({"x": torch.arange(30_000), "y": 1}, step=2)
    x = torch.zeros(30_000, dtype=torch.int64)
    assert run.restore({"x": x}) is not None
    assert x[-1] == 29_999
    return run


def heads(server: S3Server, bucket: str) -> list[dict[str, Any]]:
    client = server.client()
    rows = client.list_objects_v2(Bucket=bucket)["Contents"]
    return [client.head_object(Bucket=bucket, Key=row["Key"]) for row in rows]


def test_every_object_is_encrypted_with_the_key_that_is_named(moto_s3: S3Server) -> None:
    bucket = moto_s3.new_bucket()
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": KMS_KEY}
    run = saved(moto_s3, bucket, {**moto_s3.storage_options, "s3_additional_kwargs": encryption})
    run.delete(1)  # its tombstone, too
    found = heads(moto_s3, bucket)
    assert len(found) > 3
    assert {head["ServerSideEncryption"] for head in found} == {"aws:kms"}
    assert {head["SSEKMSKeyId"] for head in found} == {KMS_KEY}


def test_every_object_is_of_the_storage_class_that_is_named(moto_s3: S3Server) -> None:
    bucket = moto_s3.new_bucket()
    saved(moto_s3, bucket, {**moto_s3.storage_options, "s3_additional_kwargs": {"StorageClass": "STANDARD_IA"}})
    assert {head["StorageClass"] for head in heads(moto_s3, bucket)} == {"STANDARD_IA"}


def requests_of(run: ckptstore.Run, act: Any) -> list[tuple[str, dict[str, str]]]:
    """Operation and headers of each request that `act` makes."""
    assert isinstance(run._objects, S3Objects)
    client = run._objects._connected().fs.s3
    seen: list[tuple[str, dict[str, str]]] = []

    def watch(request: Any, event_name: str, **_: Any) -> None:
        headers = {
            name.lower(): value.decode() if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
        }
        seen.append((event_name.rpartition(".")[2], headers))

    client.meta.events.register("before-send.s3", watch)
    act()
    return seen


def test_whoever_asks_pays_if_they_say_so(moto_s3: S3Server) -> None:
    run = saved(moto_s3, moto_s3.new_bucket(), {**moto_s3.storage_options, "requester_pays": True})
    seen = requests_of(run, lambda: (run.save({"x": torch.ones(30_000)}, step=3), run.load(3)))
    assert {name for name, _ in seen} == {"GetObject", "PutObject", "ListObjectsV2", "DeleteObject"}
    assert all(headers.get("x-amz-request-payer") == "requester" for _, headers in seen)


def test_puts_carry_a_checksum_unless_that_is_turned_off(moto_s3: S3Server) -> None:
    def checksums(options: dict[str, Any]) -> set[bool]:
        run = saved(moto_s3, moto_s3.new_bucket(), options)
        seen = requests_of(run, lambda: run.save({"x": torch.ones(30_000)}, step=3))
        return {any("checksum" in header for header in headers) for name, headers in seen if name == "PutObject"}

    assert checksums(moto_s3.storage_options) == {True}
    off = {"config_kwargs": {"request_checksum_calculation": "when_required"}}
    assert checksums({**moto_s3.storage_options, **off}) == {False}


@pytest.fixture
def profiles(moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS settings with a profile of keys, and one of a role that is assumed with these."""
    (tmp_path / "config").write_text(
        f"[profile keys]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\nregion=us-east-1\n"
        f"endpoint_url={moto_s3.endpoint_url}\n"
        "[profile role]\nrole_arn=arn:aws:iam::123456789012:role/trainer\nsource_profile=keys\nregion=us-east-1\n"
        f"endpoint_url={moto_s3.endpoint_url}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize("profile", ["keys", "role"])
def test_profiles_and_assumed_roles_are_used_as_the_aws_tools_use_them(
    moto_s3: S3Server, profiles: None, profile: str
) -> None:
    run = saved(moto_s3, moto_s3.new_bucket(), {"profile": profile})
    [(_, headers), *_] = requests_of(run, run.steps)
    assert (f"Credential={KEY}/" in headers["authorization"]) == (profile == "keys")
    assert ("x-amz-security-token" in headers) == (profile == "role")


def test_a_bucket_with_versions_keeps_what_was_deleted_and_reads_as_any_other(moto_s3: S3Server) -> None:
    bucket, client = moto_s3.new_bucket(), moto_s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    run = saved(moto_s3, bucket, moto_s3.storage_options)
    run.delete(1)
    assert run.steps() == [2]
    assert ckptstore.Store(f"s3://{bucket}/ckpts", moto_s3.storage_options).verify().ok
    versions = client.list_object_versions(Bucket=bucket, Prefix="ckpts/runs/run/00000000000000000001")["Versions"]
    assert len(versions) == 2  # the manifest, and the tombstone that took its place


def test_the_times_of_a_listing_are_read_the_fast_way(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(told: str) -> None:
        raise AssertionError(f"botocore was asked to read {told}")

    monkeypatch.setattr("botocore.parsers.DEFAULT_TIMESTAMP_PARSER", slow)
    objects = S3Objects(f"s3://{moto_s3.new_bucket()}/ckpts", moto_s3.storage_options)
    objects.put("a", b"content")
    (row,) = objects.list("")
    assert abs(row.modified - time.time()) < 3600
