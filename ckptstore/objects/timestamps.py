"""Reading the times in S3's listings in a fifth of the time that botocore takes for it.

botocore tries dateutil's parser of any format, and looks up the local time zone, for each of the thousand rows of a
page. A collection of a million chunks read their times for two minutes, and everything else in half of one.
"""

from datetime import datetime
from typing import Any

__all__ = ["session_with_fast_timestamps"]


def session_with_fast_timestamps(options: dict[str, Any]) -> Any:
    """A session of aiobotocore, made of `options` as s3fs makes its own, whose clients read ISO times faster."""
    from aiobotocore.session import AioSession

    session = AioSession(**options)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parsed)
    return session


def _parsed(told: Any) -> datetime:
    """The same moment that botocore would read."""
    if isinstance(told, str):
        try:
            read = datetime.fromisoformat(told)
        except ValueError:
            pass  # a date as HTTP headers have it
        else:
            if read.tzinfo is not None:
                return read
    from botocore.utils import parse_timestamp

    other: datetime = parse_timestamp(told)
    return other
