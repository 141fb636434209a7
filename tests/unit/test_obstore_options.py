"""Which client of S3 is used: obstore only where it does exactly what was asked for, and s3fs otherwise."""

import importlib.metadata
from typing import Any

import pytest

from ckptstore.errors import InvalidInputError
from ckptstore.objects.obstore import ObstoreObjects
from ckptstore.objects.obstore_options import OBSTORE_VARIABLES, unmapped
from ckptstore.objects.open import open_objects
from ckptstore.objects.s3 import S3Objects
from tests.servers import no_aws_settings

__all__ = ["no_aws_settings"]

FOLLOWED: list[dict[str, Any]] = [
    {},
    {"key": "k", "secret": "s", "token": "t", "endpoint_url": "http://localhost:9000"},
    {"profile": "team"},
    {"anon": True, "use_ssl": False, "requester_pays": True},
    {"client_kwargs": {"endpoint_url": "http://localhost:9000", "region_name": "eu-central-1"}},
    {"client_kwargs": None, "config_kwargs": None, "s3_additional_kwargs": None},
    {"config_kwargs": {"read_timeout": 5, "connect_timeout": 5, "retries": {"max_attempts": 2, "mode": "standard"}}},
    {"config_kwargs": {"s3": {"addressing_style": "virtual"}, "max_pool_connections": 3}},
    {"config_kwargs": {"request_checksum_calculation": "when_required"}},
    {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:…", "BucketKeyEnabled": True}},
    {"s3_additional_kwargs": {"ServerSideEncryption": "AES256", "StorageClass": "STANDARD_IA"}},
]

NOT_FOLLOWED: dict[str, dict[str, Any]] = {
    "s3_additional_kwargs.SSECustomerKey": {"s3_additional_kwargs": {"SSECustomerKey": "0" * 32}},
    "s3_additional_kwargs.ACL": {"s3_additional_kwargs": {"ACL": "bucket-owner-full-control"}},
    "s3_additional_kwargs.Tagging": {"s3_additional_kwargs": {"Tagging": "team=a"}},
    "s3_additional_kwargs.SSEKMSEncryptionContext": {
        "s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSEncryptionContext": "e30="}
    },
    "s3_additional_kwargs.ServerSideEncryption": {"s3_additional_kwargs": {"ServerSideEncryption": "something-new"}},
    "client_kwargs.verify": {"client_kwargs": {"verify": "/etc/our-own-ca.pem"}},
    "config_kwargs.proxies": {"config_kwargs": {"proxies": {"https": "http://proxy:3128"}}},
    "config_kwargs.s3.payload_signing_enabled": {"config_kwargs": {"s3": {"payload_signing_enabled": False}}},
    "config_kwargs": {"config_kwargs": "no mapping at all"},
    "session": {"session": object()},
    "version_aware": {"version_aware": True},
    "option_of_tomorrow": {"option_of_tomorrow": 1},
}


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch, no_aws_settings: None) -> None:
    monkeypatch.delenv("CKPTSTORE_S3", raising=False)


def client_for(options: dict[str, Any]) -> type[object]:
    return type(open_objects("s3://bucket/prefix", options))


@pytest.mark.parametrize("options", FOLLOWED, ids=str)
def test_obstore_is_used_where_it_follows_every_option(options: dict[str, Any]) -> None:
    assert client_for(options) is ObstoreObjects


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_s3fs_alone_is_used_where_an_option_has_no_exact_counterpart(name: str) -> None:
    assert unmapped(NOT_FOLLOWED[name]) == [name]
    assert client_for(NOT_FOLLOWED[name]) is S3Objects


@pytest.mark.parametrize("wish", ["SSEKMSKeyId", "BucketKeyEnabled"])
def test_half_an_encryption_is_left_to_s3fs(wish: str) -> None:
    assert client_for({"s3_additional_kwargs": {wish: "x"}}) is S3Objects


@pytest.mark.parametrize("variable", OBSTORE_VARIABLES)
def test_a_variable_that_only_obstore_would_follow_leaves_all_to_s3fs(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "aws:kms")
    assert client_for({}) is S3Objects


def test_s3fs_can_be_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_S3", "s3fs")
    assert client_for({}) is S3Objects


def test_obstore_can_be_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_S3", "obstore")
    assert client_for({}) is ObstoreObjects


def test_insisting_on_obstore_with_an_option_that_it_cannot_follow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_S3", "obstore")
    with pytest.raises(InvalidInputError, match=r"cannot follow s3_additional_kwargs\.ACL exactly.*s3fs can"):
        client_for(NOT_FOLLOWED["s3_additional_kwargs.ACL"])


def test_a_client_that_there_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_S3", "boto")
    with pytest.raises(InvalidInputError, match=r"CKPTSTORE_S3='boto'.*Give s3fs or obstore"):
        client_for({})


@pytest.fixture(params=["none", "0.11.0"])
def no_good_obstore(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        assert name == "obstore"
        if request.param == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return str(request.param)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_s3fs_alone_is_used_where_obstore_is_missing_or_too_old(no_good_obstore: None) -> None:
    assert client_for({}) is S3Objects


def test_insisting_on_an_obstore_that_is_missing_is_told_with_its_remedy(
    no_good_obstore: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTSTORE_S3", "obstore")
    with pytest.raises(InvalidInputError, match=r'pip install "ckptstore\[obstore\]"'):
        client_for({})
