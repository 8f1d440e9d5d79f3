"""What a command's arguments name: an object at a node by URI or by URL, and a version of a transform."""

from dataclasses import dataclass, replace
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

import typer

from shardmill.client import Client, ObjectHandle, ObjectReader
from shardmill.core.errors import BadRequest, ShardmillError
from shardmill.core.meta import ObjectMeta
from shardmill.core.paths import parse_object_path, parse_transformed_path
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.core.specs import SPEC_DIGITS, Spec


def complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Names of transforms that begin so, for a shell; none where no node answers."""
    endpoint = context.params.get("endpoint") or context.find_root().params.get("endpoint")
    try:
        infos = connect(endpoint).transforms.list()
    except (ShardmillError, OSError):
        return []
    return sorted({info.name for info in infos if info.name.startswith(incomplete)})


EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="The node; default: SHARDMILL_ENDPOINT.")
]
TransformOption = Annotated[
    str | None, typer.Option("--transform", metavar="NAME|UUID", help="Transform it.", autocompletion=complete_name)
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Of a transform: the same bytes every time.")]
EpochOption = Annotated[
    int | None, typer.Option(metavar="N", help="Of a transform, with --seed: other draws each epoch.")
]
StartOption = Annotated[int | None, typer.Option(metavar="N", help="Of a transform: first sample, from 0.")]
CountOption = Annotated[int | None, typer.Option(metavar="N", help="Of a transform: how many samples.")]


@dataclass(frozen=True, slots=True)
class Location:
    """An object, plain or transformed, at a node."""

    client: Client
    ref: ObjectRef
    transform: str | None = None
    """A spec with its version."""
    member: str | None = None
    """Of the plain object, which is a shard."""

    def __str__(self) -> str:
        return str(self.ref) if self.member is None else f"member {self.member!r} of {self.ref}"

    @property
    def handle(self) -> ObjectHandle:
        return self.client.object(str(self.ref))

    @property
    def name(self) -> str:
        """The last part of the key, or of the member's name."""
        return (self.member or self.ref.key).rpartition("/")[2]

    @property
    def url(self) -> str:
        return self.handle.url(self.transform) if self.member is None else self.handle.member(self.member).url()

    def open(self) -> ObjectReader:
        return self.handle.get(self.transform) if self.member is None else self.handle.member(self.member).get()

    def head(self) -> ObjectMeta:
        return self.handle.head(self.transform) if self.member is None else self.handle.member(self.member).head()

    def get_range(self, start: int, stop: int) -> bytes:
        """Bytes of what is not transformed."""
        handle = self.handle if self.member is None else self.handle.member(self.member)
        return handle.get_range(start, stop)


@dataclass(frozen=True, slots=True)
class Options:
    """What a command line says of a transform."""

    transform: str | None = None
    seed: int | None = None
    epoch: int | None = None
    start: int | None = None
    count: int | None = None

    def resolve(self, client: Client, own: Spec | None = None) -> str | None:
        """The spec they mean at this node, a bare name being its newest version; None without a transform.

        Args:
            client: The node.
            own: The spec of the URL that was given, if it was one.
        """
        spec = Spec.parse(self.transform) if self.transform is not None else own
        if spec is None:
            given = [name for name in ("seed", "epoch", "start", "count") if getattr(self, name) is not None]
            if given:
                raise BadRequest(f"--{given[0]} says how to transform; it needs --transform NAME")
            return None
        if spec.digest is None:
            newest = Spec.parse(client.transforms.get(spec.name).transform.uuid)
            spec = replace(spec, digest=(newest.digest or "")[:SPEC_DIGITS], args=newest.args)
        return str(spec.with_options(seed=self.seed, epoch=self.epoch, start=self.start, count=self.count))


def connect(endpoint: str | None) -> Client:
    """The node that a command speaks to."""
    return Client(endpoint)


def is_remote(text: str) -> bool:
    """Whether an argument names something at a node rather than a local path."""
    return "://" in text


def locate(text: str, endpoint: str | None, options: Options | None = None) -> Location:
    """The object that `provider://bucket/key`, or a node's data URL, names."""
    options = options or Options()
    if not is_remote(text):
        raise BadRequest(f"{text!r} is not of the form provider://bucket/key")
    if not text.startswith(("http://", "https://")):
        client = connect(endpoint)
        return Location(client, ObjectRef.parse(text), options.resolve(client))
    parts = urlsplit(text)
    client = connect(f"{parts.scheme}://{parts.netloc}")
    if parts.path.startswith("/o/"):
        member = dict(parse_qsl(parts.query, errors="surrogateescape")).get("member")
        return Location(client, parse_object_path(parts.path), options.resolve(client), member)
    if parts.path.startswith("/t/"):
        transformed = parse_transformed_path(parts.path)
        return Location(client, transformed.ref, options.resolve(client, replace(transformed.spec, k=None)))
    raise BadRequest(f"{text!r} is no data URL of a node: its path starts with neither /o/ nor /t/")


def split_prefix(text: str) -> tuple[Bucket, str]:
    """Bucket and prefix (perhaps empty) of `provider://bucket[/prefix]`."""
    provider, separator, rest = text.partition("://")
    if not separator:
        raise BadRequest(f"{text!r} is not of the form provider://bucket[/prefix]")
    name, _, prefix = rest.partition("/")
    return Bucket.parse(f"{provider}://{name}"), prefix
