"""Reads all objects of an S3 bucket through obstore, one after the other, and drops the bytes.

`python obstore_alone.py ENDPOINT BUCKET` prints `ready`, waits for a line, reads, and prints seconds and bytes.
"""

import asyncio
import sys
import time

import obstore
from obstore.store import S3Store


async def read_all(store: S3Store) -> int:
    """Bytes read."""
    total = 0
    for meta in obstore.list(store).collect():
        answer = await obstore.get_async(store, meta["path"])
        async for piece in answer.stream():
            total += len(piece)
    return total


def main() -> None:
    store = S3Store(
        sys.argv[2],
        endpoint=sys.argv[1],
        access_key_id="name",
        secret_access_key="secret",
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        total = asyncio.run(read_all(store))
        print(time.perf_counter() - start, total, flush=True)


if __name__ == "__main__":
    main()
