"""Batches of 64 into tensors, by one loader: `python loaders.py KIND FILE.py:FUNCTION WORKERS SOURCE…`.

Prints `ready`; each line that it is then sent is answered, after one pass over all sources, by the samples, the seconds
and the seconds until the first batch. Sources are URLs of shards, or one directory of pictures.
"""

import io
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

BATCH = 64

Epoch = Callable[[], Iterable[Any]]
"""Gives the batches of one pass: tensors of pictures, or tuples that begin with one."""


def identity(value: Any) -> Any:
    return value


def webdataset_here(transform: Any, workers: int, sources: list[str]) -> Epoch:
    """Stored shards, the function on the trainer."""
    import webdataset as wds

    dataset = wds.WebDataset(sources, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    return _web_loader(dataset.map_tuple(transform, identity), workers, is_kept=workers > 0)


def webdataset_here_anew(transform: Any, workers: int, sources: list[str]) -> Epoch:
    """The same, its workers started for each pass, as a loader does that is not told otherwise."""
    import webdataset as wds

    dataset = wds.WebDataset(sources, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    return _web_loader(dataset.map_tuple(transform, identity), workers, is_kept=False)


def webdataset_in_store(_: Any, workers: int, sources: list[str]) -> Epoch:
    """Transformed shards, read by the stock pipeline."""
    import webdataset as wds
    from torchvision.transforms import ToTensor

    dataset = wds.WebDataset(sources, shardshuffle=False).decode("rgb").to_tuple("npy", "cls")
    return _web_loader(dataset.map_tuple(ToTensor(), identity), workers, is_kept=workers > 0)


def _web_loader(dataset: Any, workers: int, *, is_kept: bool) -> Epoch:
    import webdataset as wds

    batches = dataset.batched(BATCH)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=is_kept)
    return lambda: loader


def shardmill_in_store(_: Any, workers: int, sources: list[str]) -> Epoch:
    """Transformed shards, read by the loader that comes with them."""
    from shardmill.torch import data_loader

    loader = data_loader(sources, BATCH, num_workers=workers)
    epochs = itertools.count()

    def run() -> Any:
        # Each pass draws anew, as the others do; else all but the first would be given what the store has kept.
        loader.dataset.set_epoch(next(epochs))
        return loader

    return run


def spdl_files(transform: Any, workers: int, sources: list[str]) -> Epoch:
    """Plain files, the function in threads."""
    import PIL.Image
    import torch
    from spdl.pipeline import PipelineBuilder

    paths = sorted(Path(sources[0]).glob("*.jpg"))

    def make(path: Path) -> Any:
        return transform(PIL.Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))

    def run() -> Iterator[Any]:
        builder = PipelineBuilder().add_source(paths).pipe(make, concurrency=workers, output_order="input")
        pipeline = builder.aggregate(BATCH).pipe(torch.stack).add_sink(2).build(num_threads=workers + 1)
        with pipeline.auto_stop():
            yield from pipeline

    return run


def litdata_files(transform: Any, workers: int, sources: list[str]) -> Epoch:
    """Plain files, the function in the processes of torch's loader."""
    import PIL.Image
    from litdata import StreamingRawDataset
    from torch.utils.data import DataLoader

    def make(data: bytes) -> Any:
        return transform(PIL.Image.open(io.BytesIO(data)).convert("RGB"))

    directory = Path(sources[0])
    dataset = StreamingRawDataset(str(directory), cache_dir=str(directory.parent / "litdata"), transform=make)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    return lambda: loader


LOADERS = {
    "webdataset-here": webdataset_here,
    "webdataset-here-anew": webdataset_here_anew,
    "webdataset-in-store": webdataset_in_store,
    "shardmill": shardmill_in_store,
    "spdl": spdl_files,
    "litdata": litdata_files,
}


def main() -> None:
    kind, target, workers, *sources = sys.argv[1:]
    import torch

    from benchmarks.raw import module_of

    torch.set_num_threads(1)
    epoch = LOADERS[kind](module_of(target.rpartition(":")[0]).pipeline, int(workers), sources)
    print("ready", flush=True)
    for _ in sys.stdin:
        start, samples, first = time.perf_counter(), 0, 0.0
        for batch in epoch():
            pictures = batch[0] if isinstance(batch, (tuple, list)) else batch
            assert pictures.shape[1:] == (3, 224, 224) or pictures.shape[1:] == (224, 224, 3)
            assert isinstance(pictures, torch.Tensor)
            samples += len(pictures)
            first = first or time.perf_counter() - start
        print(samples, time.perf_counter() - start, first, flush=True)


if __name__ == "__main__":
    main()
