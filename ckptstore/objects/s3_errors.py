"""What S3 answers when it refuses, told apart by its codes, whichever client has asked; and what to do about it."""

from collections.abc import Mapping

__all__ = ["Refused", "RefusedAsAbsent", "advice", "code_of"]

LOST_RACE = {"PreconditionFailed", "412"}
CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
NO_KEY = {"NoSuchKey"}
"""Not a bare 404, which may be of anything on the way: a manifest would pass for deleted, and a store for a new one."""
REFUSED = {"AccessDenied", "AllAccessDisabled", "403"}
BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity"}
S3_PERMISSIONS = {"create": "s3:PutObject", "write": "s3:PutObject", "read": "s3:GetObject", "list": "s3:ListBucket",
                  "delete": "s3:DeleteObject"}  # fmt: skip
ELSEWHERE = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
"""What S3 says of a bucket that is in another region than the one that was asked."""


class Refused(OSError):
    """What S3 refused, where the client raises nothing of its own for it. Its code is found as botocore's are."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.response = {"Error": {"Code": code}}


class RefusedAsAbsent(Refused, FileNotFoundError):
    """The same where the status is 404, of a key, a bucket or what else is in the way; its code tells of which."""


def code_of(error: BaseException) -> str | None:
    """S3's own code for an error, from botocore's ClientError, or ours, somewhere in the chain of causes."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        response = getattr(link, "response", None)
        if isinstance(response, Mapping) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return str(response["Error"].get("Code") or status)
        link = link.__cause__ or link.__context__
    return None


def advice(action: str, error: BaseException, bucket: str) -> str:
    """What to do about an error of S3, or of the way to it, that ended `action` on something in `bucket`."""
    code = code_of(error)
    if code == "NoSuchBucket":
        return f"The bucket {bucket!r} does not exist there: create it, or correct the URL or the endpoint_url."
    if code in BAD_CREDENTIALS:
        return "The credentials are wrong or expired: look at key and secret (storage_options), AWS_PROFILE or token."
    if code in REFUSED:
        hint = " (without s3:ListBucket, S3 says this of a missing key too)" if action == "read" else ""
        return f"These credentials lack the permission {S3_PERMISSIONS[action]} for it{hint}: grant it, or use others."
    if type(error).__name__ == "ProfileNotFound":
        return "Give another as AWS_PROFILE or storage_options={'profile': …}, or add it to ~/.aws/config."
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return (
            "Give them as storage_options={'key': …, 'secret': …}, in AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY; for a public bucket, storage_options={'anon': True}."
        )
    if code in ELSEWHERE:
        return "The bucket is in another region: give it as storage_options={'client_kwargs': {'region_name': …}}."
    return "Check the network, the endpoint_url and the storage_options, then try again."
