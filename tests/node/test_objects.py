"""Objects of a node: access first, then the bucket's store; pages are bounded, hopeless uploads refused early."""

import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shardmill.core.conditions import Conditions
from shardmill.core.errors import AccessDenied, BucketNotFound, BucketReadOnly, ObjectNotFound, PreconditionFailed
from shardmill.core.refs import Bucket, ObjectRef
from shardmill.node.access import ANONYMOUS, Access, Action, Principal
from shardmill.node.objects import MAX_PAGE, Objects
from shardmill.storage.buckets import BucketDefinition
from shardmill.testing.stores import ABSENT, NOTHING, pieces
from tests.storage.support import POOL, open_buckets, run

REF = ObjectRef(POOL, "key")
READ_ONLY = Bucket.of("gs", "read-only")
SOMEONE = Principal("someone")


@asynccontextmanager
async def open_objects(path: Path, *rights: Action) -> AsyncIterator[Objects]:
    """A node's objects, on which `SOMEONE` has these rights and anonymous all."""
    (path / "files").mkdir(exist_ok=True)
    (path / "files" / "file").write_bytes(b"file")
    definitions = (
        BucketDefinition(POOL, None, writable=True),
        BucketDefinition(READ_ONLY, path / "files", writable=False),
    )
    everything: frozenset[Action] = frozenset(typing.get_args(Action))
    async with open_buckets(path / "data", *definitions) as buckets:
        yield Objects(buckets, Access({ANONYMOUS: everything, SOMEONE: frozenset(rights)}), None)


async def put(objects: Objects, ref: ObjectRef, data: bytes, who: Principal = ANONYMOUS) -> None:
    await objects.put(who, ref, pieces(data), size=None, user={}, conditions=NOTHING, checksum=None)


Call = Callable[[Objects], Awaitable[object]]
CALLS: dict[str, tuple[Action, Call]] = {
    "open": ("read", lambda objects: objects.open(SOMEONE, REF)),
    "head": ("read", lambda objects: objects.head(SOMEONE, REF)),
    "list": ("read", lambda objects: objects.list(SOMEONE, POOL, prefix="", delimiter="", after="", limit=1)),
    "check_put": ("write", lambda objects: objects.check_put(SOMEONE, REF, NOTHING)),
    "put": ("write", lambda objects: put(objects, REF, b"x", SOMEONE)),
    "delete": ("write", lambda objects: objects.delete(SOMEONE, REF, conditions=NOTHING)),
    "create": ("admin", lambda objects: objects.create_bucket(SOMEONE, Bucket.of("ais", "new"))),
    "remove": ("admin", lambda objects: objects.remove_bucket(SOMEONE, Bucket.of("ais", "old"), force=True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_verb_needs_its_right_and_no_other(tmp_path: Path, name: str) -> None:
    needed, call = CALLS[name]

    async def story() -> None:
        others = [action for action in typing.get_args(Action) if action != needed]
        async with open_objects(tmp_path, *others) as objects:
            await objects.create_bucket(ANONYMOUS, Bucket.of("ais", "old"))
            await put(objects, REF, b"x")
            before = [info.uri for info in objects.buckets(ANONYMOUS)]
            with pytest.raises(AccessDenied):
                await call(objects)
            assert [info.uri for info in objects.buckets(ANONYMOUS)] == before
            assert (await objects.head(ANONYMOUS, REF)).size == 1
        async with open_objects(tmp_path, needed) as objects:
            found = await call(objects)
            if name == "open":
                assert hasattr(found, "close")
                found.close()

    run(story())


def test_the_list_of_buckets_needs_the_right_to_read(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_objects(tmp_path, "write", "run", "admin") as objects:
            with pytest.raises(AccessDenied):
                objects.buckets(SOMEONE)
        async with open_objects(tmp_path, "read") as objects:
            assert [info.uri for info in objects.buckets(SOMEONE)] == ["ais://pool", "gs://read-only"]

    run(story())


def test_who_has_no_right_does_not_learn_what_exists(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_objects(tmp_path) as objects:
            for ref in (REF, ObjectRef.parse("ais://none/key"), ObjectRef(READ_ONLY, "file")):
                with pytest.raises(AccessDenied):
                    await objects.head(SOMEONE, ref)

    run(story())


def test_a_page_is_bounded_whatever_is_asked(tmp_path: Path) -> None:
    async def story() -> None:
        for number in range(MAX_PAGE + 5):
            (tmp_path / "files").mkdir(exist_ok=True)
            (tmp_path / "files" / f"{number:05d}").touch()
        async with open_objects(tmp_path) as objects:
            for limit, expected in ((10**9, MAX_PAGE), (MAX_PAGE, MAX_PAGE), (3, 3), (0, 0)):
                page = await objects.list(ANONYMOUS, READ_ONLY, prefix="", delimiter="", after="", limit=limit)
                assert len(page.objects) == expected

    run(story())


def test_what_would_be_refused_is_refused_before_the_body(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_objects(tmp_path) as objects:
            with pytest.raises(BucketReadOnly):
                await objects.check_put(ANONYMOUS, ObjectRef(READ_ONLY, "new"), NOTHING)
            with pytest.raises(BucketNotFound):
                await objects.check_put(ANONYMOUS, ObjectRef.parse("ais://none/key"), NOTHING)
            await objects.check_put(ANONYMOUS, REF, ABSENT)
            with pytest.raises(PreconditionFailed):
                await objects.check_put(ANONYMOUS, REF, Conditions.parse({"If-Match": "*"}))
            await put(objects, REF, b"x")
            with pytest.raises(PreconditionFailed):
                await objects.check_put(ANONYMOUS, REF, ABSENT)
            meta = await objects.head(ANONYMOUS, REF)
            await objects.check_put(ANONYMOUS, REF, Conditions.parse({"If-Match": f'"{meta.etag}"'}))
            await objects.check_put(ANONYMOUS, REF, NOTHING)

    run(story())


def test_writes_go_to_what_can_be_written_only(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_objects(tmp_path) as objects:
            with pytest.raises(BucketReadOnly):
                await put(objects, ObjectRef(READ_ONLY, "file"), b"x")
            with pytest.raises(BucketReadOnly):
                await objects.delete(ANONYMOUS, ObjectRef(READ_ONLY, "file"), conditions=NOTHING)
            with pytest.raises(ObjectNotFound):
                await objects.delete(ANONYMOUS, REF, conditions=NOTHING)
            assert (tmp_path / "files" / "file").read_bytes() == b"file"

    run(story())
