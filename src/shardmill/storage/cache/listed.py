"""Listings of a bucket that is somebody else's: the origin's word, and what is known while it cannot be had."""

import asyncio
from dataclasses import replace
from functools import partial

from shardmill.core.errors import BackendUnavailable, BadRequest
from shardmill.core.meta import ListPage
from shardmill.core.origins import ListOrigin, ReadOrigin
from shardmill.core.refs import Bucket
from shardmill.storage.cache.inventory import Inventory
from shardmill.storage.cache.listings import Listings


class Listed(Inventory):
    """Args:
    bucket: Its name.
    origin: Asked for pages, if it has any.
    seconds: How long a page is believed.
    """

    def __init__(self, bucket: Bucket, origin: ReadOrigin, seconds: float) -> None:
        super().__init__()
        self.bucket = str(bucket)
        self.origin = origin
        self._listings = Listings(seconds)

    async def list(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """One page, as the origin gives it or gave it a moment ago."""
        if not isinstance(self.origin, ListOrigin):
            raise BadRequest(f"{self.bucket} cannot be listed: a web server tells no names; name the objects")
        return await self._listings.get(self.origin, prefix=prefix, delimiter=delimiter, after=after, limit=limit)

    async def list_known(self, *, prefix: str, delimiter: str, after: str, limit: int) -> ListPage:
        """As `list`; while the origin is away the page as it was last, or else of what is on the disk, marked so."""
        try:
            return await self.list(prefix=prefix, delimiter=delimiter, after=after, limit=limit)
        except BackendUnavailable as error:
            last = self._listings.last(prefix=prefix, delimiter=delimiter, after=after, limit=limit)
            if last is not None:
                return replace(last, stale=error.message)
            look = partial(self.cached_page, prefix=prefix, delimiter=delimiter, after=after, limit=limit)
            return replace(await asyncio.to_thread(look), stale=error.message, is_complete=False)
