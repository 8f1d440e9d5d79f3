"""Names of things: buckets, objects, versions of transforms.

Parsed once at the edge; inside the program a `Bucket` or an `ObjectRef` is always well-formed.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import quote, unquote_to_bytes

from shardmill.core.errors import BadRequest

Provider = Literal["ais", "gs", "s3", "az", "http"]
PROVIDERS: tuple[str, ...] = get_args(Provider)
ALIASES = {"gcp": "gs", "gcs": "gs", "aws": "s3", "azure": "az", "ht": "http"}

MAX_KEY = 1024  # bytes of UTF-8, as S3

_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_IP_LIKE = re.compile(r"\d{1,3}(\.\d{1,3}){3}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """`provider://name`; the provider is never an alias."""

    provider: str
    name: str

    def __str__(self) -> str:
        return f"{'ht' if self.provider == 'http' else self.provider}://{self.name}"

    @classmethod
    def parse(cls, uri: str) -> "Bucket":
        """Parse `gs://name`; aliases (`gcp`, `aws`, `azure`, `ht`) are accepted.

        Raises:
            BadRequest: The URI names no known provider, or the name breaks the rules.
        """
        provider, separator, name = uri.partition("://")
        if not separator:
            given, _, rest = uri.partition(":")
            is_provider = given in PROVIDERS or given in ALIASES
            meant = f"{given}://{rest.lstrip('/')}" if is_provider else f"e.g. ais://{uri or 'name'}"
            raise BadRequest(f"bucket {uri!r} has no provider; write {meant}")
        return cls.of(ALIASES.get(provider, provider), name.removesuffix("/"))

    @classmethod
    def of(cls, provider: str, name: str) -> "Bucket":
        """A bucket from its two parts, checked; the provider must be canonical.

        Raises:
            BadRequest: Unknown provider or bad name, with the rule in the message.
        """
        if provider not in PROVIDERS:
            canonical = ALIASES.get(provider)
            hint = f"; in a path write {canonical!r}" if canonical else f"; known: {', '.join(PROVIDERS)}"
            raise BadRequest(f"unknown provider {provider!r}{hint}")
        if not _BUCKET_NAME.fullmatch(name) or ".." in name or _IP_LIKE.fullmatch(name) or name.startswith("xn--"):
            raise BadRequest(
                f"bad bucket name {name!r}: 3 to 63 of a-z, 0-9, '.', '_' and '-', starting and ending with a letter "
                "or digit, not an IP address"
            )
        return cls(provider, name)


@dataclass(frozen=True, slots=True, order=True)
class ObjectRef:
    """An object's name: bucket + key. The key is any UTF-8 of 1 to 1024 bytes without control characters."""

    bucket: Bucket
    key: str

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}"

    @classmethod
    def of(cls, bucket: Bucket, key: str) -> "ObjectRef":
        """A ref with its key checked.

        Raises:
            BadRequest: The key is empty, too long, not UTF-8 or has control characters.
        """
        return cls(bucket, check_key(key))

    @classmethod
    def parse(cls, uri: str) -> "ObjectRef":
        """Parse `gs://bucket/key`; nothing in the key is decoded.

        Raises:
            BadRequest: Not of that form.
        """
        provider, separator, rest = uri.partition("://")
        name, slash, key = rest.partition("/")
        if not separator or not slash or not key:
            raise BadRequest(f"object {uri!r} is not of the form provider://bucket/key")
        return cls.of(Bucket.parse(f"{provider}://{name}"), key)


def check_key(key: str) -> str:
    """The key itself if it is one.

    Raises:
        BadRequest: Names the rule that it breaks.
    """
    if not key:
        raise BadRequest("the object key is empty")
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise BadRequest("the object key is not valid UTF-8") from error
    if size > MAX_KEY:
        raise BadRequest(f"the object key has {size} bytes; at most {MAX_KEY} are allowed")
    if _CONTROL.search(key):
        raise BadRequest(f"the object key {key!r} has control characters")
    return key


def quote_key(key: str) -> str:
    """A key as it stands in a URL path: all but RFC 3986's unreserved characters and `/` percent-encoded.

    WebDataset splits URLs at `::` and expands braces, so these must never stand raw.
    """
    return quote(key, safe="/-._~")


def unquote_path(raw: str) -> str:
    """Decode a raw (still percent-encoded) path part, strictly.

    Raises:
        BadRequest: A bad escape, or bytes that are not UTF-8.
    """
    if re.search(r"%(?![0-9A-Fa-f]{2})", raw):
        raise BadRequest("the path has a '%' that is not followed by two hex digits")
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise BadRequest("the path is not valid UTF-8 once decoded") from error
