"""Signing requests as AWS Signature Version 4 has it, for requests without a body."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

from shardmill.core.values import Secret

EMPTY_BODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class AccessKey:
    """A key of S3; `token` is empty but for temporary ones."""

    name: str
    secret: Secret
    token: Secret


def signed_headers(
    key: AccessKey,
    *,
    host: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    region: str,
    now: datetime,
) -> dict[str, str]:
    """The headers of a GET, the given ones among them, with its signature.

    Args:
        key: To sign with.
        host: As in the Host header.
        path: Percent-encoded, as sent.
        query: Decoded; sent as `canonical_query` has it.
        headers: Further ones that are sent and signed.
        region: Of the bucket.
        now: In UTC.
    """
    date = now.strftime("%Y%m%dT%H%M%SZ")
    sent = {"host": host, "x-amz-content-sha256": EMPTY_BODY, "x-amz-date": date}
    sent |= {name.lower(): value for name, value in headers.items()}
    if key.token:
        sent["x-amz-security-token"] = str(key.token)
    names = ";".join(sorted(sent))
    lines = "".join(f"{name}:{sent[name].strip()}\n" for name in sorted(sent))
    request = "\n".join(["GET", path, canonical_query(query), lines, names, EMPTY_BODY])
    scope = f"{date[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    signature = _sign(key, scope, f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}")
    sent["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={key.name}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return sent


def canonical_query(query: Mapping[str, str]) -> str:
    """Names and values encoded, then sorted."""
    encoded = sorted((quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in encoded)


def _sign(key: AccessKey, scope: str, text: str) -> str:
    derived = b"AWS4" + key.secret.encode()
    for part in (*scope.split("/"), text):
        derived = hmac.new(derived, part.encode(), hashlib.sha256).digest()
    return derived.hex()
