"""A hundred thousand keys through the API: every page full and in order, none twice, none left out."""

import asyncio
import random
from pathlib import Path

from shardmill.client import Client
from shardmill.core.meta import ObjectMeta
from shardmill.testing.node import running_node
from tests.storage.support import open_pool, run

KEYS = 100_000
PAGE = 1000
AT_ONCE = 5000


def key_of(number: int) -> str:
    return f"train/shard-{number // PAGE:04d}/sample-{number:08d}.jpg"


async def fill(data: Path) -> None:
    """Entries of the index, which is all that a listing reads, in no order."""
    numbers = list(range(KEYS))
    random.Random(1).shuffle(numbers)
    async with open_pool(data) as store:
        index = store._index()
        for start in range(0, KEYS, AT_ONCE):
            metas = [
                ObjectMeta(key_of(number), number, "e" * 32, "v", float(number))
                for number in numbers[start : start + AT_ONCE]
            ]
            await asyncio.gather(*[index.put(store.identity, meta) for meta in metas])


def test_a_hundred_thousand_keys_come_in_order_page_by_page(tmp_path: Path) -> None:
    run(fill(tmp_path))
    with running_node("--bucket", "ais://pool", data=tmp_path) as node, Client(node.endpoint) as client:
        bucket = client.bucket("ais://pool")
        number = 0
        for page in bucket.pages(limit=PAGE):
            assert len(page.objects) == PAGE
            for info in page.objects:
                assert (info.key, info.size) == (key_of(number), number)
                number += 1
        assert number == KEYS
        (rolled,) = bucket.pages("train/", "/")
        assert rolled.prefixes == [f"train/shard-{shard:04d}/" for shard in range(KEYS // PAGE)]
        assert [info.key for info in bucket.list("train/shard-0042/")] == [
            key_of(42_000 + part) for part in range(PAGE)
        ]
