"""What s3fs was told and botocore has worked out, as obstore takes it; and what cannot be said to obstore exactly.

Nothing is resolved twice. Credentials, region, endpoint and time-outs are read off the client that s3fs has made, so
profiles, roles, ~/.aws/config and the environment mean the same for both. What has no exact counterpart is named, and
then s3fs serves alone: an encryption that was asked for must never be dropped in silence.
"""

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from fsspec.asyn import sync

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

__all__ = ["Stores", "attributes", "is_installed", "stores_like", "tries", "unmapped"]

OLDEST = (0, 12)
READ_OFF_THE_CLIENT = {
    "": {"anon", "endpoint_url", "key", "username", "secret", "password", "token", "profile", "use_ssl"},
    "client_kwargs": {"endpoint_url", "region_name"},
    "config_kwargs": {"connect_timeout", "read_timeout", "retries", "max_pool_connections", "s3", "signature_version"},
    "config_kwargs.retries": {"max_attempts", "total_max_attempts", "mode"},  # botocore itself writes a mode there
    "config_kwargs.s3": {"addressing_style"},
}
HANDED_ON = {
    "": {"requester_pays"},
    "config_kwargs": {"request_checksum_calculation"},
    "s3_additional_kwargs": {"ServerSideEncryption", "SSEKMSKeyId", "BucketKeyEnabled", "StorageClass"},
}
WITHOUT_EFFECT = {
    # Of files and listings: nothing here opens a file, and listings stay with s3fs.
    "": {"default_block_size", "default_fill_cache", "default_cache_type", "use_listings_cache", "max_concurrency"},
    # obstore looks at no checksum that comes with an answer, and gets only what TLS or our own digests protect.
    "config_kwargs": {"response_checksum_validation"},
}
NESTED = {"client_kwargs", "config_kwargs", "s3_additional_kwargs", "config_kwargs.retries", "config_kwargs.s3"}
ENCRYPTIONS = {"AES256", "aws:kms", "aws:kms:dsse"}
OBSTORE_VARIABLES = (
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_CHECKSUM_ALGORITHM",
)
"""What obstore reads from the environment, and botocore does not; nor can it be taken back by an option."""
WHOLE_PUT = 5
"""obstore knows no limit for the pauses in a put, only one for all of it: so many times botocore's for a pause."""
CREDENTIALS_SECONDS = 600
"""After half of this obstore asks for the credentials again. botocore renews them 10 minutes before they expire."""
CHECKED_ON_THE_WAY = ("https://",)
"""obstore compares no checksum that comes with an answer, as s3fs does, so TLS must, or the caller's digest and another
try through s3fs: an object that was changed or cut off on the way would else be taken for damaged for good."""
FOREVER = timedelta(days=365)


def is_installed() -> bool:
    """Whether there is an obstore that is new enough. Does not import it."""
    try:
        version = importlib.metadata.version("obstore")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= OLDEST


def unmapped(options: Mapping[str, Any]) -> list[str]:
    """The names of those storage_options and environment variables that only s3fs can follow. Makes no request."""
    found = list(_unknown("", options))
    wishes = options.get("s3_additional_kwargs") or {}
    encryption = wishes.get("ServerSideEncryption")
    if encryption not in ENCRYPTIONS and {"ServerSideEncryption", "SSEKMSKeyId", "BucketKeyEnabled"} & set(wishes):
        found.append("s3_additional_kwargs.ServerSideEncryption")
    return found + [name for name in OBSTORE_VARIABLES if name in os.environ]


def _unknown(place: str, options: Mapping[str, Any]) -> Iterator[str]:
    known = {name for table in (READ_OFF_THE_CLIENT, HANDED_ON, WITHOUT_EFFECT) for name in table.get(place, ())}
    for name, option in options.items():
        path = f"{place}.{name}".lstrip(".")
        if path in NESTED and isinstance(option or {}, Mapping):
            yield from _unknown(path, option or {})
        elif name not in known:
            yield path


class Stores(NamedTuple):
    """obstore's, of one bucket."""

    puts: Any
    gets: Any
    gets_are_protected: bool
    """Whether what they return is as the server has sent it; if not, their caller has to check it."""


def stores_like(fs: Any, bucket: str) -> Stores | None:
    """What asks for the same as a connected s3fs does; None if only that will do."""
    from obstore.store import S3Store

    if ":" in bucket or bucket.endswith("--x-s3"):
        return None  # access points by their ARN, directory buckets: signed in ways of their own
    client, endpoint = fs.s3, _bucket_url(fs, bucket)
    config = client.meta.config
    if not _can_follow(fs, endpoint):
        return None
    place: dict[str, Any] = {
        "bucket": bucket,
        "config": {
            "endpoint": endpoint,
            "virtual_hosted_style_request": True,  # that is: the endpoint names the bucket
            "region": client.meta.region_name.replace("aws-global", "us-east-1"),
            "skip_signature": bool(fs.anon),
            "unsigned_payload": False,
            "request_payer": bool(fs.req_kw),
            **_encryption(fs.s3_additional_kwargs),
        },
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=1)},  # those are ours, of every kind
        **({} if fs.anon else {"credential_provider": _credentials(fs)}),
    }
    pause = timedelta(seconds=config.read_timeout)
    connection: ClientConfig = {"allow_http": True, "connect_timeout": timedelta(seconds=config.connect_timeout)}
    of_puts: ClientConfig = {**connection}
    checked: S3Config = {}
    if config.request_checksum_calculation != "when_required":
        checked["checksum_algorithm"] = "sha256"
        of_puts["default_headers"] = {"x-amz-sdk-checksum-algorithm": "SHA256"}  # as the SDKs name it; some servers ask
    puts = S3Store(**place, client_options={**of_puts, "timeout": WHOLE_PUT * pause}, **checked)
    gets = S3Store(**place, client_options={**connection, "timeout": FOREVER, "read_timeout": pause})
    return Stores(puts, gets, gets_are_protected=endpoint.startswith(CHECKED_ON_THE_WAY))


def attributes(options: Mapping[str, Any]) -> dict[str, str]:
    """What goes along with every put, beside the encryption."""
    wishes = options.get("s3_additional_kwargs") or {}
    return {"Storage-Class": wishes["StorageClass"]} if "StorageClass" in wishes else {}


def tries(fs: Any) -> int:
    """How often s3fs would ask: five times as often as botocore does."""
    return 5 * int((fs.s3.meta.config.retries or {}).get("total_max_attempts", 5))


def _bucket_url(fs: Any, bucket: str) -> str:
    """Where botocore would send a request, whatever it was that told it so."""
    signed: str = fs.url(f"{bucket}/key")
    return signed.partition("?")[0].removesuffix("/key")


def _can_follow(fs: Any, endpoint: str) -> bool:
    """Whether obstore can do what the client was told by ~/.aws/config and the environment, too."""
    config = fs.s3.meta.config
    is_adaptive = (config.retries or {}).get("mode") == "adaptive"
    is_signed_otherwise = not fs.anon and config.signature_version != "s3v4"
    return not (is_adaptive or is_signed_otherwise or config.proxies or _trusts_others(fs, endpoint))


def _trusts_others(fs: Any, endpoint: str) -> bool:
    """Whether s3fs is to trust other authorities than obstore does, which looks for them where OpenSSL does."""
    authorities = fs.session.get_config_variable("ca_bundle")
    return endpoint.startswith("https://") and authorities not in (None, os.environ.get("SSL_CERT_FILE"))


def _encryption(wishes: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "ServerSideEncryption": "server_side_encryption",
        "SSEKMSKeyId": "sse_kms_key_id",
        "BucketKeyEnabled": "sse_bucket_key_enabled",
    }
    return {name: wishes[wish] for wish, name in names.items() if wish in wishes}


def _credentials(fs: Any) -> Callable[[], dict[str, Any]]:
    """What obstore calls for credentials: those that s3fs signs with, renewed by botocore."""
    if fs.key and fs.secret:
        given = {"access_key_id": fs.key, "secret_access_key": fs.secret, "token": fs.token, "expires_at": None}
        return lambda: given

    def renewed() -> dict[str, Any]:
        async def frozen() -> Any:
            return await (await fs.session.get_credentials()).get_frozen_credentials()

        found = sync(fs.loop, frozen)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_SECONDS),
        }

    return renewed
