"""The servers that tests of faults may ask for."""

from tests.servers import certificate, moto_s3, no_aws_settings, seaweed_s3, through_s3fs

__all__ = ["certificate", "moto_s3", "no_aws_settings", "seaweed_s3", "through_s3fs"]
