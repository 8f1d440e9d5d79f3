"""Copies inside a node: both rights are needed, and what a PUT would refuse is refused."""

from pathlib import Path

import pytest

from shardmill.core.errors import AccessDenied, BadRequest, ObjectNotFound, TooLarge
from shardmill.core.meta import MAX_USER
from shardmill.core.refs import ObjectRef
from shardmill.core.values import Size
from shardmill.node.access import ANONYMOUS
from shardmill.node.copies import Copies
from shardmill.testing.stores import NOTHING, pieces
from tests.node.test_objects import REF, SOMEONE, open_objects, put
from tests.storage.support import POOL, run

TARGET = ObjectRef(POOL, "target")


@pytest.mark.parametrize("rights", [("read", "run", "admin"), ("write", "run", "admin"), ("read", "write")])
def test_a_copy_needs_the_rights_to_read_and_to_write(tmp_path: Path, rights: tuple[str, ...]) -> None:
    async def story() -> None:
        async with open_objects(tmp_path, *rights) as objects:  # type: ignore[arg-type]
            await put(objects, REF, b"bytes")
            copying = Copies(objects, Size(100)).copy(SOMEONE, REF, TARGET, if_absent=False)
            if rights == ("read", "write"):
                assert (await copying).created
                return
            with pytest.raises(AccessDenied):
                await copying
            with pytest.raises(ObjectNotFound):
                await objects.head(ANONYMOUS, TARGET)

    run(story())


def test_what_a_put_would_refuse_is_not_copied(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_objects(tmp_path) as objects:
            await put(objects, REF, b"12345")
            with pytest.raises(TooLarge):
                await Copies(objects, Size(4)).copy(ANONYMOUS, REF, TARGET, if_absent=False)
            user = {"name": "x" * MAX_USER}
            await objects.put(ANONYMOUS, REF, pieces(b"12345"), size=5, user=user, conditions=NOTHING, checksum=None)
            with pytest.raises(BadRequest):
                await Copies(objects, Size(5)).copy(ANONYMOUS, REF, TARGET, if_absent=False)
            with pytest.raises(ObjectNotFound):
                await objects.head(ANONYMOUS, TARGET)

    run(story())
