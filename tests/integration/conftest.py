"""The servers, and the ranks, that integration tests may ask for."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks
from tests.servers import moto_s3, no_aws_settings, seaweed_s3

__all__ = ["moto_s3", "no_aws_settings", "ranks", "seaweed_s3"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes with a gloo process group."""
    made = Ranks(4)
    yield made
    made.stop()
