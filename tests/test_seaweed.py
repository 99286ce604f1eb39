"""The S3 server of the tests must not stand in its own way."""

import pytest

from tests.seaweed import S3Server, seaweed


@pytest.mark.slow
def test_a_second_server_starts_beside_the_first(s3: S3Server) -> None:
    with seaweed() as other:
        assert other.endpoint != s3.endpoint
        assert other.make_bucket("abc") == "s3://abc"
