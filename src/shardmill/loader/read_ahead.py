"""Batches read ahead of the trainer, in a thread: receiving releases the interpreter, so both work at once."""

import queue
import threading
from collections.abc import Iterator

from shardmill.loader.rows import Batch


class IterationEnded(RuntimeError):
    """Batches were asked of an iteration that was left: its loader was closed, or began another one."""


class ReadAhead:
    """The batches of an iterator, which is held by nobody else. Resources: `close` it, which also closes a generator.

    Args:
        ahead: Batches; 0: none, and no thread.
    """

    def __init__(self, batches: Iterator[Batch], ahead: int) -> None:
        self._batches = batches
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(max(ahead, 1))
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="shard loader", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._take()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            del item  # its arrays may be used again as soon as the trainer lets go of them

    def close(self) -> None:
        """Stop; whatever was read ahead is dropped, and whoever asks for more gets an error, not an end."""
        self._is_stopped.set()
        thread, self._thread = self._thread, None
        if thread is None:
            self._end()
            return
        while thread.is_alive() or not self._queue.empty():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                thread.join(0.05)
        # Somebody may be waiting there.
        self._queue.put_nowait(_ended())

    def _take(self) -> Batch | BaseException | None:
        if self._is_stopped.is_set():
            return _ended()
        return next(self._batches, None) if self._thread is None else self._queue.get()

    def _read(self) -> None:
        try:
            for batch in self._batches:
                self._put(batch)
                if self._is_stopped.is_set():
                    break
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            self._end()

    def _end(self) -> None:
        batches, self._batches = self._batches, iter(())
        close = getattr(batches, "close", None)
        if close is not None:
            close()

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._is_stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def _ended() -> IterationEnded:
    return IterationEnded("this iteration was left: its loader was closed, or began another one or another epoch")
