"""What a node does with a request for the results that it keeps: which there are, and removing them."""

import asyncio
import builtins
import heapq
from dataclasses import dataclass

from shardmill.core.api import RemovedResults, ResultInfo, Results
from shardmill.core.errors import BadRequest
from shardmill.core.refs import Bucket
from shardmill.core.sources import ResultEntry, ResultFiles
from shardmill.core.specs import SPEC_DIGITS, Spec
from shardmill.etl.versions.registry import Versions
from shardmill.node.access import Access, Principal

MAX_RESULTS = 1000  # in one answer


@dataclass(frozen=True, slots=True)
class ResultFilter:
    """Which results are meant; None: whatever it is."""

    transform: Spec | None = None
    """Name, and digits and `args` where given."""
    bucket: Bucket | None = None
    key: str | None = None
    """Of the object that was transformed."""

    @property
    def is_empty(self) -> bool:
        return self == ResultFilter()

    def matches(self, result: ResultEntry) -> bool:
        facts = result.facts
        is_there = self.bucket is None or facts["bucket"] == str(self.bucket)
        return is_there and self.key in (None, facts["object"]) and self._is_of(facts["transform"])

    def _is_of(self, label: str) -> bool:
        wanted = self.transform
        if wanted is None:
            return True
        version = Spec.parse(label)
        digits = (wanted.digest or "")[:SPEC_DIGITS]
        return (
            wanted.name == version.name
            and (version.digest or "").startswith(digits)
            and wanted.args in (None, version.args)
        )


class KeptResults:
    """Results of a node, with access checked.

    Args:
        files: Where they are kept; None: nowhere.
        access: Who may do what.
        versions: The transforms that there are.
    """

    def __init__(self, files: ResultFiles | None, access: Access, versions: Versions) -> None:
        self._files = files
        self._access = access
        self._versions = versions

    async def list(self, principal: Principal, wanted: ResultFilter, *, limit: int = MAX_RESULTS) -> Results:
        """Those that match, the last used first; `limit` is cut to `MAX_RESULTS`."""
        self._access.check(principal, "read", wanted.bucket)
        if self._files is None:
            return Results([], 0, 0, 0, 0)
        found = await asyncio.to_thread(self._find, wanted)
        newest = heapq.nlargest(min(limit, MAX_RESULTS), found, key=lambda entry: entry.used)
        statistics = self._files.statistics()
        return Results(
            [_info(entry) for entry in newest],
            len(found),
            sum(entry.size for entry in found),
            used=statistics.used,
            capacity=int(statistics.capacity),
        )

    async def remove(self, principal: Principal, wanted: ResultFilter, *, everything: bool) -> RemovedResults:
        """Remove those that match; who has one open keeps it to its end, and the next reader makes it again.

        Raises:
            BadRequest: Nothing is said of which, and `everything` is False.
            TransformNotFound: There is no such transform, and nothing is left of one.
        """
        self._access.check(principal, "run", wanted.bucket)
        if wanted.is_empty and not everything:
            raise BadRequest("say which results: transform, bucket, key; or all=true for all there are")
        if not wanted.is_empty and everything:
            raise BadRequest("all=true goes with no transform, bucket or key")
        found = await asyncio.to_thread(self._find, wanted) if self._files is not None else []
        if not found and wanted.transform is not None:
            self._versions.find(wanted.transform.name, wanted.transform.digest, wanted.transform.args)
        if self._files is None:
            return RemovedResults(0, 0)
        keys = [entry.key for entry in found]
        return RemovedResults(len(keys), await self._files.remove(keys))

    def _find(self, wanted: ResultFilter) -> builtins.list[ResultEntry]:
        """In a thread: there may be very many."""
        assert self._files is not None
        return [entry for entry in self._files.list() if wanted.matches(entry)]


def _info(entry: ResultEntry) -> ResultInfo:
    facts = entry.facts
    return ResultInfo(
        key=entry.key,
        transform=facts["transform"],
        spec=facts["spec"],
        bucket=facts["bucket"],
        object=facts["object"],
        version=facts["version"],
        environment=facts["environment"],
        size=entry.size,
        etag=entry.etag,
        made=entry.made,
        used=entry.used,
        scratch=entry.is_scratch,
        readers=entry.readers,
    )
