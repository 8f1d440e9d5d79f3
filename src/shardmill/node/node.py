"""A node, assembled: storage, transforms, access."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from shardmill import __version__
from shardmill.config import BucketSettings, Config
from shardmill.core.api import ConfigInfo
from shardmill.etl.engine import Engine
from shardmill.node.access import Access
from shardmill.node.ahead import LookAhead
from shardmill.node.batches import Batches
from shardmill.node.cache import Cache
from shardmill.node.coming import Coming
from shardmill.node.copies import Copies
from shardmill.node.finished import FinishedResults
from shardmill.node.objects import Objects
from shardmill.node.results import KeptResults
from shardmill.node.settings import masked_settings
from shardmill.node.shards import Shards
from shardmill.node.transforms import Transforms
from shardmill.storage.buckets import BucketDefinition, Buckets, CacheSize, RemoteBacking
from shardmill.storage.cache.policy import CachePolicy
from shardmill.storage.members import MemberIndexes
from shardmill.storage.origins import open_origin
from shardmill.storage.results import ResultStore


@dataclass(frozen=True, slots=True)
class Node:
    """What the faces speak to."""

    config: Config
    objects: Objects
    transforms: Transforms
    finished: FinishedResults
    shards: Shards
    batches: Batches
    results: KeptResults
    cache: Cache
    copies: Copies

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config) -> AsyncIterator["Node"]:
        """Assemble it; on exit nothing of it is left running.

        Raises:
            ShardmillError: The data directory is in use or unfit; the message says why.
        """
        access = Access()
        data = config.server.data
        definitions = [
            BucketDefinition(
                bucket=settings.bucket,
                path=settings.directory,
                writable=settings.is_writable,
                links=config.storage.links,
                durability=settings.durability or config.storage.durability,
                remote=_remote(settings, config) if settings.is_remote else None,
            )
            for settings in config.buckets
        ]
        async with AsyncExitStack() as parts:
            buckets = await parts.enter_async_context(
                Buckets.open(
                    data,
                    definitions,
                    threads=config.storage.threads,
                    durability=config.storage.durability,
                    cache=CacheSize(config.cache.capacity, config.cache.high, config.cache.low),
                )
            )
            members = await parts.enter_async_context(
                MemberIndexes.open_directory(data / "members", capacity=config.storage.member_indexes)
            )
            results = None
            if config.results.mode == "on":
                results = await parts.enter_async_context(
                    ResultStore.open_directory(
                        data / "results",
                        capacity=config.results.capacity,
                        most=config.results.most,
                        scratch_seconds=config.results.scratch,
                    )
                )
            engine = await parts.enter_async_context(
                Engine.open(
                    config.transforms,
                    data,
                    config.environments,
                    config.packages,
                    results=results,
                    spool_window=config.results.spool_window,
                )
            )
            cache = Cache(buckets, access)
            coming = await parts.enter_async_context(Coming(cache, depth=config.cache.look_ahead))
            objects = Objects(buckets, access, coming)
            ahead = await parts.enter_async_context(LookAhead(engine, objects, depth=config.transforms.look_ahead))
            transforms = Transforms(engine, objects, access, ahead)
            finished = FinishedResults(engine, objects, ahead, results)
            shards, kept = Shards(engine, objects, members), KeptResults(results, access, engine.versions)
            batches = Batches(objects, shards)
            copies = Copies(objects, config.storage.max_object)
            yield cls(config, objects, transforms, finished, shards, batches, kept, cache, copies)

    def describe(self) -> ConfigInfo:
        """The effective configuration, secrets masked."""
        return ConfigInfo(
            version=__version__,
            workers=self.config.transforms.worker_count,
            settings=masked_settings(self.config),
            environments=list(self.transforms.environments()),
            isolation=self.transforms.isolation(),
        )


def _remote(settings: BucketSettings, config: Config) -> RemoteBacking:
    policy = CachePolicy(
        revalidate=settings.revalidate,
        ttl=settings.ttl,
        absent_seconds=config.cache.absent,
        list_seconds=config.cache.listing,
        pin=settings.pin,
    )
    place = "/".join(part for part in (settings.endpoint or settings.account, settings.prefix) if part)
    return RemoteBacking(settings.backing, place, partial(open_origin, settings, config.origins), policy)
