"""The servers that tests of faults may ask for."""

from tests.servers import moto_s3, no_aws_settings, seaweed_s3

__all__ = ["moto_s3", "no_aws_settings", "seaweed_s3"]
