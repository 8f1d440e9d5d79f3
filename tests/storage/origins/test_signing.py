"""Signature Version 4, judged by the example that AWS documents."""

from datetime import UTC, datetime

from shardmill.core.values import Secret
from shardmill.storage.origins.sigv4 import AccessKey, canonical_query, signed_headers


def test_the_documented_example_is_signed_as_documented() -> None:
    """ "Examples: Signature Calculations", GET Bucket (List Objects), of Amazon S3's API reference."""
    headers = signed_headers(
        AccessKey("AKIAIOSFODNN7EXAMPLE", Secret("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"), Secret()),
        host="examplebucket.s3.amazonaws.com",
        path="/",
        query={"prefix": "J", "max-keys": "2"},
        headers={},
        region="us-east-1",
        now=datetime(2013, 5, 24, tzinfo=UTC),
    )
    assert headers["authorization"].endswith(
        "Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
    )


def test_a_temporary_key_sends_its_token_signed() -> None:
    headers = signed_headers(
        AccessKey("name", Secret("secret"), Secret("token")),
        host="h",
        path="/b",
        query={},
        headers={"X-Amz-Request-Payer": "requester"},
        region="r",
        now=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert headers["x-amz-security-token"] == "token"
    assert "x-amz-request-payer;x-amz-security-token" in headers["authorization"]


def test_a_query_is_encoded_and_sorted() -> None:
    assert canonical_query({"prefix": "a b/ü+", "a": "", "B": "~"}) == "B=~&a=&prefix=a%20b%2F%C3%BC%2B"
