from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.utils import parse_timestamp

from ckptstore.objects.timestamps import session_with_fast_timestamps


def parser() -> Any:
    """What a client of the session reads times with."""
    factory = session_with_fast_timestamps({}).get_component("response_parser_factory")
    return factory.create_parser("rest-xml")._timestamp_parser


@pytest.mark.parametrize(
    "told",
    [
        "2026-11-26T16:00:05.000Z",
        "2026-11-26T16:00:05.123456Z",
        "2026-11-26T16:00:05Z",
        "2026-11-26T16:00:05.25+02:00",
        "20261126T160005Z",
        "2026-11-26T16:00:05",
        "2026-11-26",
        "Thu, 26 Nov 2026 16:00:05 GMT",
        "1795708805",
        "1795708805.5",
        1795708805,
        0,
    ],
)
def test_every_form_of_a_time_is_the_moment_that_botocore_reads(told: Any) -> None:
    assert parser()(told) == parse_timestamp(told)


def test_a_time_of_a_listing_is_read_without_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("botocore.utils.parse_timestamp")
    assert parser()("2026-11-26T16:00:05.000Z") == datetime(2026, 11, 26, 16, 0, 5, tzinfo=UTC)


@pytest.mark.parametrize("told", ["", "yesterday", "2026-13-01T00:00:00Z", None])
def test_what_is_no_time_is_refused_as_botocore_refuses_it(told: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as theirs:
        parse_timestamp(told)
    with pytest.raises(theirs.type):
        parser()(told)
