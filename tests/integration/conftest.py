"""The servers, and the ranks, that integration tests may ask for."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks
from tests.servers import certificate, moto_s3, no_aws_settings, seaweed_s3, through_s3fs

__all__ = ["certificate", "moto_s3", "no_aws_settings", "ranks", "seaweed_s3", "through_s3fs"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes with a gloo process group."""
    made = Ranks(4)
    yield made
    made.stop()
