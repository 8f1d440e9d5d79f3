"""`Client`: one node, by its endpoint. Making one, and making URLs, touches no network."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Self

import msgspec

from shardmill.client.batch import BatchItem, Missing, Wanted, read_batch
from shardmill.client.handles import BucketHandle, ObjectHandle
from shardmill.client.http import DEFAULT_ENDPOINT, Transport
from shardmill.client.jobs import JobsHandle
from shardmill.client.transforms import TransformsHandle
from shardmill.core.api import Announcement, BucketInfo, Buckets, CacheInfo, ConfigInfo, Runs, SampleCounts, ShardNames
from shardmill.core.errors import BadRequest, ObjectNotFound
from shardmill.core.jobs import is_manifest
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.templates import expand, listing_prefix, match_listing, needs_listing

MAX_ANNOUNCED = 10_000  # URLs of one list
ANNOUNCE_SECONDS = 0.5  # for each step; a node that is away must not hold up a script that only makes URLs

BucketName = str | Bucket | BucketHandle


class Client:
    """A node and what can be asked of it. Safe to share between threads, to pickle and to use after a fork."""

    __shardmill_unshippable__: ClassVar[str] = "a Client"

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        """Args:
        endpoint: `http://HOST:PORT`; default: `SHARDMILL_ENDPOINT`, else http://localhost:51080.
        token: Access token; default: `SHARDMILL_TOKEN`.
        """
        self._token = token if token is not None else os.environ.get("SHARDMILL_TOKEN")
        self._transport = Transport(endpoint or os.environ.get("SHARDMILL_ENDPOINT") or DEFAULT_ENDPOINT, self._token)
        self.transforms = TransformsHandle(self._transport)
        self.jobs = JobsHandle(self._transport)

    @property
    def endpoint(self) -> str:
        return self._transport.endpoint

    def __repr__(self) -> str:
        return f"Client({self.endpoint!r})"

    def __reduce__(self) -> tuple[type["Client"], tuple[str, str | None]]:
        return Client, (self.endpoint, self._token)

    def bucket(self, uri: BucketName) -> BucketHandle:
        """The bucket `provider://name`; whether it exists is not asked."""
        return BucketHandle(self._transport, _bucket(uri))

    def object(self, uri: str) -> ObjectHandle:
        """The object `provider://bucket/key`."""
        return ObjectHandle(self._transport, ObjectRef.parse(uri))

    def buckets(self) -> list[BucketInfo]:
        """All buckets of the node."""
        with self._transport.request("GET", "/api/buckets") as answer:
            return msgspec.json.decode(answer.read_all(), type=Buckets).buckets

    def config(self) -> ConfigInfo:
        """The node's effective settings, secrets masked, with its environments and isolation layers."""
        with self._transport.request("GET", "/api/config") as answer:
            return msgspec.json.decode(answer.read_all(), type=ConfigInfo)

    def cache(self) -> CacheInfo:
        """What is on the node's disk of buckets with a store behind them, and what it cost."""
        with self._transport.request("GET", "/api/cache") as answer:
            return msgspec.json.decode(answer.read_all(), type=CacheInfo)

    def runs(self) -> Runs:
        """What goes on: runs with their readers, rates and bottlenecks, and the workers."""
        with self._transport.request("GET", "/api/runs") as answer:
            return msgspec.json.decode(answer.read_all(), type=Runs)

    def probe(self) -> Mapping[str, str]:
        """Ask whether the node lives; returns the headers of its answer."""
        with self._transport.request("GET", "/healthz") as answer:
            answer.read_all()
            return answer.headers

    def metrics(self) -> str:
        """The node's metrics, in Prometheus' text format."""
        with self._transport.request("GET", "/metrics") as answer:
            return answer.read_all().decode()

    def object_url(
        self,
        bucket: BucketName,
        object_name: str,
        transform_id: str | None = None,
        *,
        seed: int | None = None,
        epoch: int | None = None,
        start: int | None = None,
        count: int | None = None,
    ) -> str:
        """The URL of an object, transformed if a version is named; no network.

        Args:
            bucket: `provider://name`.
            object_name: The key, taken literally.
            transform_id: A spec, as `WDTransform.uuid`.
            seed: Makes the random draws of a transform repeatable; put in place of the spec's own, like all below.
            epoch: Varies them from epoch to epoch; needs a seed.
            start: First sample, counted from 0.
            count: How many samples from there.

        Raises:
            BadRequest: (A ValueError.) A name without a version, a bad option, or a name too long for a cache file.
        """
        return (
            self.bucket(bucket).object(object_name).url(transform_id, seed=seed, epoch=epoch, start=start, count=count)
        )

    def expand_object_urls(
        self,
        bucket: BucketName,
        transform_id: str | None = None,
        template: str | None = None,
        *,
        names: Iterable[str] | None = None,
        prefix: str | None = None,
        seed: int | None = None,
        epoch: int | None = None,
    ) -> list[str]:
        """URLs of many objects, in order. Exactly one of template, names and prefix says which.

        The list is announced to the node, which then begins a shard while the one before it is read, and fetches what
        comes from a store. A node that does not answer changes nothing.

        Args:
            bucket: `provider://name`.
            transform_id: A spec, as `WDTransform.uuid`.
            template: `shard-{000000..000005}.tar` (also `{a,b}` and `{0..10..2}`), `shard-@5.tar` (0 to 5), or
                `shard-%06d.tar`, which lists the bucket.
            names: Keys, taken literally.
            prefix: Lists the bucket.
            seed: As in `object_url`.
            epoch: As in `object_url`.

        Raises:
            ObjectNotFound: A listing has nothing that fits.
            BadRequest: (A ValueError.) As `object_url`, or a template with unbalanced braces or with a `*`.
        """
        handle = self.bucket(bucket)
        keys = self._keys(handle, template, names, prefix)
        urls = [handle.object(key).url(transform_id, seed=seed, epoch=epoch) for key in keys]
        if len(urls) > 1:
            self.announce(urls)
        return urls

    def count_samples(self, uris: Sequence[str]) -> list[int]:
        """How many samples there are in each shard (`provider://bucket/key`), counted by the node from tar headers.

        Raises:
            ObjectNotFound, BadShard: One of them does not exist, or is no shard.
        """
        body = msgspec.json.encode(ShardNames(list(uris)))
        headers = {"Content-Type": "application/json"}
        with self._transport.request("POST", "/api/samples", headers=headers, body=body) as answer:
            return msgspec.json.decode(answer.read_all(), type=SampleCounts).counts

    def read_batch(self, wanted: Iterable[Wanted], *, missing: Missing = "fail") -> Iterator[BatchItem]:
        """Members of any shards, and whole objects, in the order in which they are wanted, thousands by a request.

        Of each object one request's items are of one version.

        *Recovery:* what is cut is asked for again from the first item that did not arrive.

        Args:
            wanted: URIs of objects, or pairs of a shard's URI and a member's name; taken as they are needed.
            missing: What becomes of objects and members that do not exist: `fail`, before the first item of the request
                that names them, or `skip`, which leaves them out.

        Raises:
            BucketNotFound, ObjectNotFound, MemberNotFound: Something named does not exist.
            BadShard: What is named for a member is no good tar.
        """
        yield from read_batch(self._transport, wanted, missing=missing)

    def announce(self, urls: Sequence[str]) -> None:
        """Say that these will be read in this order, transformed or raw; a node that does not hear it loses nothing."""
        paths = [url.removeprefix(self.endpoint) for url in urls[:MAX_ANNOUNCED]]
        body = msgspec.json.encode(Announcement(paths))
        self._transport.tell("/api/lookahead", body, seconds=ANNOUNCE_SECONDS)

    def close(self) -> None:
        """Close idle connections; the client stays usable."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keys(
        self, handle: BucketHandle, template: str | None, names: Iterable[str] | None, prefix: str | None
    ) -> Sequence[str]:
        if sum(given is not None for given in (template, names, prefix)) != 1:
            raise BadRequest("give exactly one of template, names and prefix")
        if names is not None:
            if isinstance(names, str):
                raise BadRequest("names is a sequence of keys, not one string; for a pattern use template")
            return list(names)
        if template is not None and "*" in template:
            prefix = template.partition("*")[0]
            raise BadRequest(
                f"a template has braces, @N or %06d, but no '*' as {template!r} has; list by prefix={prefix!r}, "
                "or give keys that have a '*' as names="
            )
        if template is not None and not needs_listing(template):
            return expand(template)
        if template is not None:
            listed = (item.key for item in handle.list(listing_prefix(template)))
            keys = list(match_listing(template, listed))
        else:
            # What jobs have written of themselves is no shard.
            keys = [item.key for item in handle.list(prefix or "") if not is_manifest(item.key)]
        if not keys:
            wanted = f"matches {template!r}" if template is not None else f"starts with {prefix!r}"
            raise ObjectNotFound(f"no object of {handle.uri} {wanted}")
        return keys


def _bucket(name: BucketName) -> Bucket:
    if isinstance(name, BucketHandle):
        return name.bucket
    return Bucket.parse(name) if isinstance(name, str) else name
