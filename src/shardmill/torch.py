"""Tensors for a training loop: `ShardLoader` as a torch dataset, a loader made of it, and URL lists that know epochs.

Tensors share the memory of the loader's arrays: no byte is copied between the socket and the tensor.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shardmill.core.errors import BadRequest
from shardmill.loader import ShardLoader
from shardmill.loader.read_ahead import ReadAhead
from shardmill.loader.rows import Batch

__all__ = ["EpochUrls", "ShardDataLoader", "ShardDataset", "data_loader"]


class ShardDataset(IterableDataset):  # type: ignore[misc]  # torch is untyped here
    """Batches of tensors. In a `DataLoader` give `batch_size=None`: what this gives is a batch already.

    Each worker process of a `DataLoader` counts as a rank of its own, so ranks × workers share an epoch; the number of
    workers must be the same on every rank. Arguments are those of `ShardLoader`.
    """

    def __init__(
        self, urls: Sequence[str], batch_size: int, fields: Sequence[str] = ("npy", "cls"), **options: Any
    ) -> None:
        super().__init__()
        self._arguments = (list(urls), batch_size, tuple(fields))
        # Shared with worker processes, which outlive an epoch when they are persistent.
        self._epoch = multiprocessing.get_context("spawn").Value("q", 0, lock=False)
        self._loader: ShardLoader | None = None
        self._opened_by = 0
        self._handed: tuple[Mapping[str, Any], int] | None = None
        with ShardLoader(*self._arguments, **options) as loader:
            # Asked once, here; the workers need not ask again.
            self._options = {**options, "counts": loader.counts}
            self._length = len(loader)

    def __len__(self) -> int:
        """Batches of a whole epoch without worker processes."""
        return self._length

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        loader = self._open()
        loader.set_epoch(self._epoch.value)
        for batch in loader:
            yield tensors_of(batch)

    @property
    def epoch(self) -> int:
        return int(self._epoch.value)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: another order and other draws. Call it before the epoch's `iter`."""
        self._epoch.value = epoch
        if self._loader is not None:
            self._loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """As `ShardLoader.state_dict`; in the process that iterates. With worker processes ask `data_loader`'s."""
        loader = self._open()
        loader.set_epoch(self.epoch)
        return loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `ShardLoader.load_state_dict`."""
        self._open().load_state_dict(state)
        self._epoch.value = state["epoch"]

    def hand_on(self, state: Mapping[str, Any], taken: int) -> None:
        """Where worker processes that are started from now on begin.

        Args:
            state: Of an epoch.
            taken: Batches that these same workers have had of it, in turn.
        """
        self._handed = state, taken

    def open_group(self, workers: int) -> ShardLoader:
        """What knows where this rank's worker processes stand together; it reads nothing."""
        return self._open_rank(0, workers)

    def close(self) -> None:
        """Stop reading, if an epoch was left before its end."""
        if self._loader is not None:
            self._loader.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}

    def _open(self) -> ShardLoader:
        # A forked worker finds the loader of the process that it came from.
        if self._loader is None or self._opened_by != os.getpid():
            self._opened_by = os.getpid()
            info = get_worker_info()
            if info is None:
                self._loader = ShardLoader(*self._arguments, **self._options)
            elif self._handed is None:
                self._loader = self._open_rank(info.id, info.num_workers)
            else:
                # A DataLoader begins with its first worker, whose turn it may not be.
                state, taken = self._handed
                self._loader = self._open_rank((info.id + taken) % info.num_workers, info.num_workers)
                self._loader.load_state_dict(state)
        return self._loader

    def _open_rank(self, worker: int, workers: int) -> ShardLoader:
        rank, world_size = self._options.get("rank", 0), self._options.get("world_size", 1)
        options = {**self._options, "rank": rank * workers + worker, "world_size": world_size * workers}
        return ShardLoader(*self._arguments, **options, workers=workers)


class ShardDataLoader(DataLoader):  # type: ignore[misc]  # torch is untyped here
    """A `DataLoader` over `ShardDataset` whose state is exact, with worker processes, too.

    Worker processes live as long as an epoch is read, until `close` at most. Go on with as many of them as before, and
    the very next batch comes; with another number, what is left is shared out anew.

    Args:
        dataset: Gives the batches.
        options: Of `DataLoader`, but for `persistent_workers`.

    Raises:
        BadRequest: (A ValueError.) Worker processes that know nothing of where this one stands.
    """

    def __init__(self, dataset: ShardDataset, **options: Any) -> None:
        if options.get("persistent_workers"):
            raise BadRequest("persistent_workers: each epoch begins where the state says, with workers of its own")
        super().__init__(dataset, batch_size=None, **options)
        # Worker processes are ahead of what was given out, so this process counts.
        self._group = dataset.open_group(self.num_workers) if self.num_workers else None
        self._given = 0
        self._reading: ReadAhead | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.dataset) if self._group is None else len(self._group) * self.num_workers

    def __iter__(self) -> Iterator[Any]:
        group = self._group
        if group is None:
            yield from super().__iter__()
            return
        self._stop()
        self._follow(group)
        self.dataset.hand_on(group.state_after(self._given), self._given)
        # Held there alone, so that the worker processes end with it, whoever still holds this generator.
        reading = self._reading = ReadAhead(super().__iter__(), 0)
        try:
            for batch in reading:
                self._given += 1
                yield batch
            group.rewind()
            self._given = 0
        finally:
            reading.close()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: another order and other draws. Setting the one that is going on changes nothing."""
        self.dataset.set_epoch(epoch)
        if self._group is not None:
            self._follow(self._group)

    def state_dict(self) -> dict[str, Any]:
        """As `ShardLoader.state_dict`: where this epoch stands, after the batches that were given out."""
        if self._group is None:
            return dict(self.dataset.state_dict())
        self._follow(self._group)
        return self._group.state_after(self._given)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `ShardLoader.load_state_dict`."""
        if self._group is None:
            self.dataset.load_state_dict(state)
            return
        self._stop()
        self._group.load_state_dict(state)
        self.dataset.set_epoch(state["epoch"])
        self._given = self._group.taken

    def close(self) -> None:
        """Stop reading, if an epoch was left before its end; no worker process lives on."""
        self._stop()
        self.dataset.close()
        if self._group is not None:
            self._group.close()

    def _follow(self, group: ShardLoader) -> None:
        """The epoch may have been set at the dataset."""
        if group.epoch != self.dataset.epoch:
            self._stop()
            group.set_epoch(self.dataset.epoch)
            self._given = 0

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None


def data_loader(
    urls: Sequence[str],
    batch_size: int,
    fields: Sequence[str] = ("npy", "cls"),
    *,
    num_workers: int = 0,
    pin_memory: bool | None = None,
    **options: Any,
) -> ShardDataLoader:
    """A ready `torch.utils.data.DataLoader` over `ShardDataset`, with `set_epoch`, `state_dict` and `load_state_dict`.

    One process receives some GB/s, so no worker processes are needed for speed, except for a `function` of the
    trainer's own.

    Args:
        urls: As for `ShardLoader`, like `batch_size`, `fields` and further options.
        batch_size: Samples.
        fields: What a batch has.
        num_workers: Worker processes; each gets its share of the samples.
        pin_memory: Copy batches into pinned memory; default: if CUDA is there.
        options: Of `ShardLoader`.
    """
    return ShardDataLoader(
        ShardDataset(urls, batch_size, fields, **options),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
    )


class EpochUrls(IterableDataset):  # type: ignore[misc]  # torch is untyped here
    """The first stage of a WebDataset pipeline: URLs whose transforms draw anew in each epoch.

    `webdataset.WebDataset` fixes its list when it is made, so with a seed in the URLs every epoch would see the same
    crops. `webdataset.DataPipeline` asks for the URLs again each time:

    ```python
    urls = EpochUrls(lambda epoch: client.expand_object_urls(bucket, etl.uuid, template, seed=1, epoch=epoch))
    dataset = wds.DataPipeline(
        urls, wds.split_by_worker, wds.tarfile_to_samples(), wds.decode("rgb"), wds.to_tuple("npy", "cls")
    )
    ```

    Args:
        build: Gives the URLs of an epoch, e.g. `lambda epoch: client.expand_object_urls(…, seed=1, epoch=epoch)`.
    """

    def __init__(self, build: Callable[[int], Sequence[str]]) -> None:
        super().__init__()
        self._build = build
        self._epoch = multiprocessing.get_context("spawn").Value("q", 0, lock=False)

    def set_epoch(self, epoch: int) -> None:
        """Seen by worker processes too, when they begin to iterate."""
        self._epoch.value = epoch

    def __iter__(self) -> Iterator[dict[str, str]]:
        for url in self._build(self._epoch.value):
            yield {"url": url}


def tensors_of(batch: Batch) -> tuple[Any, ...]:
    """A batch with tensors in place of arrays, without copying; lists stay lists."""
    return tuple(torch.from_numpy(column) if _is_numeric(column) else column for column in batch)


def _is_numeric(column: Any) -> bool:
    return isinstance(column, np.ndarray) and column.dtype.kind in "biufc"
