"""`ShardLoader`: batches of numpy arrays from shards of a node, shared among ranks, to be stopped and gone on with."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Self
from urllib.parse import urlsplit

from shardmill.client.answers import NodeUnreachable
from shardmill.client.client import Client
from shardmill.client.reading import ObjectReader
from shardmill.core.errors import BadRequest
from shardmill.core.paths import parse_object_path, parse_transformed_path
from shardmill.core.refs import ObjectRef
from shardmill.core.specs import Spec
from shardmill.loader.columns import ArrayPool
from shardmill.loader.local import LocalFunction
from shardmill.loader.plan import (
    Interval,
    Piece,
    Row,
    Stretch,
    batch_sizes,
    cut,
    length,
    remaining,
    share,
    window_order,
    windows_of,
)
from shardmill.loader.read_ahead import ReadAhead
from shardmill.loader.rows import Batch, Rows
from shardmill.loader.stream import SampleStream

STATE_VERSION = 2
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries to reach the node for a shard; it is restarted in less


@dataclass(frozen=True, slots=True)
class _Shard:
    ref: ObjectRef
    spec: Spec | None


class ShardLoader:
    """Batches from transformed shards (`/t/…` URLs), or from plain ones (`/o/…`) with a function of the trainer's own.

    ```python
    loader = ShardLoader(urls, batch_size=64, rank=rank, world_size=world_size, shuffle=True, seed=1)
    for epoch in range(90):
        loader.set_epoch(epoch)
        for images, classes in loader:
            ...
    ```

    Every rank has as many batches, and together they have every source sample once. All batches are full but the last
    of each rank; where that would be none for some ranks, their last two share what is left. What a function drops or
    multiplies makes its own batch smaller or larger. Arrays are used again once the trainer holds none of a batch any
    more.

    It reads one epoch at a time: `close`, `set_epoch` of another, `load_state_dict` and another `iter` end the
    iteration that is going on, whose next batch is then `IterationEnded`.

    Resources: `close` it, or use it as a context manager, if an epoch is left before its end.
    *Recovery:* a broken connection or a node that is restarted is gone on with at the sample in work.
    """

    def __init__(
        self,
        urls: Sequence[str],
        batch_size: int,
        fields: Sequence[str] = ("npy", "cls"),
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        window: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        counts: Sequence[int] | None = None,
        function: Callable[[dict[str, Any]], Any] | None = None,
        decoder: str | None = "pil",
        prefetch: int = 2,
        progress: Callable[[int], None] | None = None,
        token: str | None = None,
        workers: int = 1,
    ) -> None:
        """Args:
        urls: Data URLs of one node, as `expand_object_urls` gives them. Their own seed counts; without one, `seed`.
        batch_size: Samples.
        fields: What a batch has, in this order; `jpg;png` takes the first that a sample has, `__key__` is its key.
        rank: Of this process, from 0.
        world_size: Processes that share an epoch.
        shuffle: Draw the order of the shards anew for each epoch.
        window: Samples that are shuffled among themselves, rounded down to whole batches; 0: none.
        seed: Of all draws, and of transforms without a seed of their own.
        drop_last: Leave out what does not fill a batch, of every rank.
        counts: Source samples of each shard; default: asked of the node.
        function: For `/o/` URLs: what would otherwise run in the node. It is called in this thread, so nothing is
            read ahead, and the process's generators are seeded for each call as in the node.
        decoder: How its fields are decoded, as `wd_decoder` of `WDTransform`; without a function, how pictures are.
        prefetch: Batches read ahead in a thread; 0: none.
        progress: Called with the number of samples of each batch that is given out.
        token: Access token; default: `SHARDMILL_TOKEN`.
        workers: Consecutive ranks whose batches one process takes in turn, as `DataLoader` does with its workers.

        Raises:
            BadRequest: (A ValueError.) URLs of several nodes, or of another form, or numbers that make no sense.
            ObjectNotFound, BadShard: A shard is missing or broken.
        """
        _check(urls, batch_size, rank, world_size, window, prefetch, workers)
        origin, self._shards = _parse(urls)
        if function is not None and any(shard.spec is not None for shard in self._shards):
            raise BadRequest("function= is for plain shards (/o/…); these URLs are transformed in the node")
        self.fields = tuple(fields)
        self.batch_size = batch_size
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.epoch = 0
        self.taken = 0
        """Batches of this epoch that its ranks (of its group) had before `load_state_dict`, if they are the same."""
        self._client = Client(origin, token)
        self._shuffle, self._window, self._seed, self._drop_last = shuffle, window, seed, drop_last
        self._decoder, self._prefetch, self._progress = decoder, prefetch, progress
        self._function = None if function is None else LocalFunction(function, decoder, seed=seed)
        self._pool = ArrayPool()
        self.counts = self._count() if counts is None else list(counts)
        if len(self.counts) != len(self._shards):
            raise BadRequest(f"{len(self.counts)} counts for {len(self._shards)} URLs")
        self._history: list[Stretch] = []
        self._given = 0
        self._reading: ReadAhead | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch, the same for every rank."""
        total = sum(self.counts)
        return len(batch_sizes(total, self.rank, self.world_size, self.batch_size, drop_last=self._drop_last))

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch: all, or what is left after `load_state_dict`. At its end it begins anew."""
        self._stop()
        # A function of this process shares its generators with the trainer, so it has to take turns.
        ahead = 0 if self._function is not None else self._prefetch
        reading = self._reading = ReadAhead(self._make(), ahead)
        try:
            for batch in reading:
                self._given += 1
                if self._progress is not None:
                    self._progress(max((len(column) for column in batch), default=0))
                yield batch
            self.rewind()
        finally:
            reading.close()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: another order and other draws. Setting the one that is going on changes nothing."""
        if epoch != self.epoch:
            self._stop()
            self.epoch = epoch
            self.rewind()

    def rewind(self) -> None:
        """Begin the epoch anew."""
        self._history, self._given, self.taken = [], 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this epoch stands; equal for all ranks that have had as many batches."""
        return self.state_after(self._given)

    def state_after(self, batches: int) -> dict[str, Any]:
        """As `state_dict`, where other processes read the batches that were given out.

        Args:
            batches: Of this epoch, of this rank; of the group where there are `workers`.
        """
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "history": [asdict(stretch) for stretch in (*self._history, self._stretch(batches))],
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader of the same URLs stopped, of any rank, with any number of ranks.

        Raises:
            BadRequest: The state is of other shards, of another seed, or of a later program.
        """
        if state["version"] != STATE_VERSION:
            raise BadRequest(f"the loader's state has version {state['version']}; this program reads {STATE_VERSION}")
        for name, own in self._identity().items():
            if state[name] != own:
                raise BadRequest(f"the loader's state is of other {name} ({state[name]}; here: {own})")
        self._stop()
        self.rewind()
        self.epoch = state["epoch"]
        *self._history, last = (Stretch(**stretch) for stretch in state["history"])
        if last == self._stretch(last.batches):
            # The same ranks go on: the very batches that would have come.
            self.taken, self._given = last.batches, last.batches_of(self.rank)
        else:
            self._history.append(last)

    def close(self) -> None:
        """Stop reading."""
        self._stop()
        self._client.close()
        if self._function is not None:
            self._function.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self) -> list[int]:
        try:
            return self._client.count_samples([str(shard.ref) for shard in self._shards])
        except BaseException:
            self._client.close()
            raise

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _stretch(self, batches: int) -> Stretch:
        return Stretch(self.world_size, self.batch_size, self._window, batches, self._drop_last, self.workers)

    def _identity(self) -> dict[str, Any]:
        """What the row of an epoch depends on."""
        digest = hashlib.sha256()
        for shard, count in zip(self._shards, self.counts, strict=True):
            digest.update(f"{shard.ref} {count}\n".encode("utf-8", "surrogateescape"))
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "samples": sum(self.counts),
            "shards": digest.hexdigest()[:16],
        }

    def _make(self) -> Iterator[Batch]:
        """Batches from the point where this epoch stands."""
        row = Row.build(self.counts, seed=self._seed, epoch=self.epoch, shuffle=self._shuffle)
        intervals: list[Interval] = [(0, row.size)]
        for stretch in self._history:
            intervals = remaining(intervals, stretch, seed=self._seed, epoch=self.epoch)
        total = length(intervals)
        own = share(intervals, self.rank, self.world_size)
        sizes = batch_sizes(total, self.rank, self.world_size, self.batch_size, drop_last=self._drop_last)
        windows = windows_of(sizes, self._window)
        skipped, done = 0, self._given
        while windows and done >= len(windows[0]):
            done -= len(windows[0])
            skipped += sum(windows.pop(0))
        if windows and not self._window:
            # Nothing is shuffled, so what was given need not be read again.
            skipped += sum(windows[0][:done])
            windows[0], done = windows[0][done:], 0
        kept = cut(own, skipped, skipped + sum(map(sum, windows)))
        pieces = row.pieces(kept)
        self._announce(pieces)
        yield from self._batches(pieces, windows, kept, done)

    def _batches(
        self, pieces: Sequence[Piece], windows: Sequence[Sequence[int]], kept: Sequence[Interval], done: int
    ) -> Iterator[Batch]:
        with contextlib.closing(self._samples(pieces)) as samples:
            yield from self._assemble(samples, windows, kept, done)

    def _assemble(
        self,
        samples: "Iterator[tuple[int, Callable[[Rows], None]]]",
        windows: Sequence[Sequence[int]],
        kept: Sequence[Interval],
        done: int,
    ) -> Iterator[Batch]:
        """Batches of the samples, whose positions grow; the first `done` batches of the first window are left out."""
        position = 0
        waiting = next(samples, None)
        for group in windows:
            size = sum(group)
            rows = Rows(self.fields, size, self._pool, self._decoder)
            while waiting is not None and waiting[0] < position + size:
                rows.begin(waiting[0] - position)
                waiting[1](rows)
                waiting = next(samples, None)
            order = list(range(size))
            if self._window:
                first = _nth(kept, position)
                order = window_order(self._seed, self.epoch, first, size)
            stops = list(accumulate(group))
            for number, stop in enumerate(stops):
                if number >= done:
                    yield rows.take(order[stop - group[number] : stop])
            done = 0
            position += size

    def _samples(self, pieces: Sequence[Piece]) -> Generator[tuple[int, "Callable[[Rows], None]"], None, None]:
        """Each sample's position in this rank's share, and what puts it into a row, to be called before the next."""
        offset = 0
        for piece in pieces:
            shard = self._shards[piece.shard]
            if shard.spec is not None:
                yield from self._made(shard, piece, offset)
            else:
                yield from self._plain(shard, piece, offset)
            offset += piece.count

    def _made(self, shard: _Shard, piece: Piece, offset: int) -> "Iterator[tuple[int, Callable[[Rows], None]]]":
        with self._open(shard.ref, str(self._spec_of(shard, piece))) as reader:
            stream = SampleStream(reader, first=piece.start, is_made=True)
            arriving = stream.fields()
            field = next(arriving, None)
            while field is not None:
                sample = field.sample
                position = offset + field.ordinal - piece.start

                def put(rows: Rows) -> None:
                    nonlocal field
                    rows.key(field.key)  # type: ignore[union-attr]  # of the sample that this was given for
                    while field is not None and field.sample == sample:  # noqa: B023
                        rows.read(stream, field)
                        field = next(arriving, None)
                    rows.end()

                yield position, put

    def _plain(self, shard: _Shard, piece: Piece, offset: int) -> "Iterator[tuple[int, Callable[[Rows], None]]]":
        stop = piece.start + piece.count
        function, epoch = self._function, self.epoch
        with self._open(shard.ref, None) as reader:
            stream = SampleStream(reader, first=0, is_made=False)
            for ordinal, key, payloads in _whole(stream, piece.start, stop):

                def put(rows: Rows) -> None:
                    if function is None:
                        rows.add(key, payloads)  # noqa: B023
                        return
                    for made, fields in function(shard.ref, epoch, ordinal, key, payloads):  # noqa: B023
                        rows.add(made, fields)

                yield offset + ordinal - piece.start, put

    def _open(self, ref: ObjectRef, spec: str | None) -> ObjectReader:
        """A shard's body. *Recovery:* a node that is away for some seconds is waited for."""
        for wait in WAITS:
            try:
                return self._client.object(str(ref)).get(spec)
            except NodeUnreachable:
                time.sleep(wait)
        return self._client.object(str(ref)).get(spec)

    def _spec_of(self, shard: _Shard, piece: Piece) -> Spec:
        """The spec for a piece: the loader's seed where the URL has none, its epoch, and only these samples."""
        spec = shard.spec
        assert spec is not None
        seed = self._seed if spec.seed is None else spec.seed
        spec = replace(spec, seed=seed, epoch=self.epoch, k=None)
        if (piece.start, piece.count) != (0, self.counts[piece.shard]):
            spec = replace(spec, start=piece.start, count=piece.count)
        return spec

    def _announce(self, pieces: Sequence[Piece]) -> None:
        named = [(self._shards[piece.shard], piece) for piece in pieces]
        urls = [
            self._client.object(str(shard.ref)).url(None if shard.spec is None else str(self._spec_of(shard, piece)))
            for shard, piece in named
        ]
        if len(urls) > 1:
            self._client.announce(urls)


def _nth(intervals: Sequence[Interval], number: int) -> int:
    return cut(intervals, number, number + 1)[0][0]


def _whole(stream: SampleStream, start: int, stop: int) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Samples [start, stop) of a plain shard, whole."""
    ordinal, key = -1, ""
    payloads: dict[str, bytes] = {}
    for field in stream.fields():
        if field.ordinal != ordinal:
            if start <= ordinal < stop:
                yield ordinal, key, payloads
            ordinal, key, payloads = field.ordinal, field.key, {}
            if ordinal >= stop:
                return
        if ordinal >= start:
            payloads[field.field] = stream.read(field)
    if start <= ordinal < stop:
        yield ordinal, key, payloads


def _parse(urls: Sequence[str]) -> tuple[str, list[_Shard]]:
    """The node's endpoint and what the URLs name there."""
    shards, endpoints = [], set()
    for url in urls:
        parts = urlsplit(url)
        face = next((face for face in ("/t/", "/o/") if face in parts.path), None)
        if parts.scheme not in ("http", "https") or face is None:
            raise BadRequest(f"{url!r} is not a data URL of a node (http://HOST:PORT/t/… or /o/…)")
        base, _, _ = parts.path.partition(face)
        endpoints.add(f"{parts.scheme}://{parts.netloc}{base}")
        path = parts.path[len(base) :]
        if face == "/o/":
            shards.append(_Shard(parse_object_path(path), None))
            continue
        named = parse_transformed_path(path)
        if named.spec.start or named.spec.count is not None:
            raise BadRequest(f"{url!r} is of a part of a shard; give whole ones, parts are the loader's business")
        shards.append(_Shard(named.ref, named.spec))
    if len(endpoints) != 1:
        raise BadRequest(f"the URLs are of {len(endpoints)} nodes; a loader reads from one")
    return endpoints.pop(), shards


def _check(
    urls: Sequence[str], batch_size: int, rank: int, world_size: int, window: int, prefetch: int, workers: int
) -> None:
    if isinstance(urls, str) or not urls:
        raise BadRequest("urls is a sequence of data URLs, not empty")
    is_sound = batch_size > 0 and 0 <= rank < world_size and window >= 0 and prefetch >= 0
    if not is_sound or workers < 1 or world_size % workers:
        raise BadRequest(
            f"batch_size={batch_size}, rank={rank}, world_size={world_size}, window={window}, prefetch={prefetch}, "
            f"workers={workers} make no sense together"
        )
