"""Tensors for a training loop: `ShardLoader` as a torch dataset, a loader made of it, and URL lists that know epochs.

Tensors share the memory of the loader's arrays: no byte is copied between the socket and the tensor.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shardmill.loader import ShardLoader
from shardmill.loader.rows import Batch

__all__ = ["EpochUrls", "ShardDataset", "data_loader"]


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
        self._options = options
        # Shared with worker processes, which outlive an epoch when they are persistent.
        self._epoch = multiprocessing.get_context("spawn").Value("q", 0, lock=False)
        self._loader: ShardLoader | None = None
        self._state: Mapping[str, Any] | None = None
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

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: another order and other draws. Call it before the epoch's `iter`."""
        self._epoch.value = epoch

    def state_dict(self) -> dict[str, Any]:
        """As `ShardLoader.state_dict`; in the process that iterates, so without worker processes."""
        return self._open().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `ShardLoader.load_state_dict`."""
        self._open().load_state_dict(state)
        self._epoch.value = state["epoch"]

    def close(self) -> None:
        """Stop reading, if an epoch was left before its end."""
        if self._loader is not None:
            self._loader.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}

    def _open(self) -> ShardLoader:
        if self._loader is None:
            info = get_worker_info()
            options = dict(self._options)
            if info is not None:
                options["rank"] = options.get("rank", 0) * info.num_workers + info.id
                options["world_size"] = options.get("world_size", 1) * info.num_workers
            self._loader = ShardLoader(*self._arguments, **options)
        return self._loader


def data_loader(
    urls: Sequence[str],
    batch_size: int,
    fields: Sequence[str] = ("npy", "cls"),
    *,
    num_workers: int = 0,
    pin_memory: bool | None = None,
    **options: Any,
) -> DataLoader:
    """A ready `torch.utils.data.DataLoader` over `ShardDataset`.

    One process receives some GB/s, so no worker processes are needed for speed.

    Args:
        urls: As for `ShardLoader`, like `batch_size`, `fields` and further options.
        batch_size: Samples.
        fields: What a batch has.
        num_workers: Worker processes; each gets its share of the samples.
        pin_memory: Copy batches into pinned memory; default: if CUDA is there.
        options: Of `ShardLoader`.
    """
    dataset = ShardDataset(urls, batch_size, fields, **options)
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=num_workers > 0,
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
