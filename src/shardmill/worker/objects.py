"""A whole object through a function: `bytes` takes all of it and returns the output, `stream` reads and writes files.

What the function raises, or gives that is no output, is the object's failure.
"""

import contextlib
import functools
import inspect
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shardmill.worker.calls import SampleFailure, failure_of
from shardmill.worker.exchange import ENCODE, USER, Exchange
from shardmill.worker.limits import FILE_SIZE

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

NAME_BYTES = 200  # of an object's file name, from its end, kept in the path that a function gets

_BUFFER = 1 << 20
_COPIED = 8 << 20


class Task(Protocol):
    """What is done with one object."""

    def __call__(self, exchange: Exchange, *, key: str, ref: str, seed: int) -> None:
        """Do it; `ref` is `provider://bucket/key`.

        Raises:
            SampleFailure: The user's code failed.
        """
        ...


class BytesTask:
    """Calls a function with the object's bytes, or with the path of a file that has them; others with what it gave."""

    def __init__(self, functions: Sequence[Callable[..., Any]], *, by_path: bool) -> None:
        self._functions = [(function, takes_ref(function)) for function in functions]
        self._by_path = by_path

    def __call__(self, exchange: Exchange, *, key: str, ref: str, seed: int) -> None:
        value: Any
        with called(ref), file_of(exchange, key) if self._by_path else whole_of(exchange) as value:
            exchange.lap(ENCODE)
            for function, wants_ref in self._functions:
                value = function(value, **({"ref": ref} if wants_ref else {}))
                if not isinstance(value, (bytes, bytearray, memoryview)):
                    kind = type(value).__name__
                    raise SampleFailure(f"{ref}: the function returned {kind}; return the output as bytes")
        exchange.lap(USER)
        exchange.write(value)


class StreamTask:
    """Calls a function with two files: one to read the object from, one to write the output to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._takes_ref = takes_ref(function)

    def __call__(self, exchange: Exchange, *, key: str, ref: str, seed: int) -> None:
        more = {"ref": ref} if self._takes_ref else {}
        reader, writer = io.BufferedReader(ObjectReader(exchange, key), _BUFFER), ObjectWriter(exchange)
        with called(ref):
            result = self._function(reader, writer, **more)
        exchange.lap(USER)
        if result is not None:
            raise SampleFailure(
                f"{ref}: the function returned {type(result).__name__}; write the output to the writer, return nothing"
            )


class ObjectReader(io.RawIOBase):
    """The object as a file: read and seek."""

    def __init__(self, exchange: Exchange, key: str) -> None:
        super().__init__()
        self.name = key
        self._exchange = exchange
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._exchange.size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the object's start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        with memoryview(buffer) as given, given.cast("B") as view:
            data = self._exchange.read(self._position, len(view))
            view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = self._exchange.read(self._position, self._exchange.size)
        self._position += len(data)
        return data


class ObjectWriter(io.RawIOBase):
    """The output as a file: what is written reaches readers soon, at `flush` at once."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._exchange.written

    def write(self, data: "ReadableBuffer", /) -> int:
        if self.closed:
            raise ValueError("write to a closed file")
        with memoryview(data) as view:
            return self._exchange.write(view)

    def flush(self) -> None:
        if not self.closed:
            self._exchange.flush()


def takes_ref(function: Callable[..., Any]) -> bool:
    """Whether the function has a parameter `ref` that is not given yet."""
    if isinstance(function, functools.partial) and "ref" in function.keywords:
        return False
    try:
        parameter = inspect.signature(function).parameters.get("ref")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


@contextlib.contextmanager
def called(ref: str) -> Iterator[None]:
    """Around user code: all that it raises is its failure."""
    try:
        yield
    except SampleFailure:
        raise
    except BaseException as error:
        raise failure_of(error, ref) from None


@contextlib.contextmanager
def whole_of(exchange: Exchange) -> Iterator[bytes]:
    """All bytes of the object."""
    try:
        data = exchange.read(0, exchange.size)
    except (MemoryError, OverflowError):
        message = (
            f"the object has {exchange.size} bytes, more than a worker has memory for; use by_path, or kind stream"
        )
        raise SampleFailure(message) from None
    yield data


@contextlib.contextmanager
def file_of(exchange: Exchange, key: str) -> Iterator[str]:
    """Path of a file that has the object's bytes, under its own file name, for as long as this lasts.

    The object's own file where nothing else is in it and this process cannot write to it; else a copy.
    """
    exchange.wait_available(exchange.size)
    exchange.skip_lap()
    folder = tempfile.mkdtemp(prefix="object-")
    try:
        path = os.path.join(folder, _file_name(key))
        # By the process's number: what it starts has other descriptors.
        own = f"/proc/{os.getpid()}/fd/{exchange.descriptor}"
        if os.fstat(exchange.descriptor).st_size == exchange.size and not _can_write(own):
            os.symlink(own, path)
            exchange.bytes_in = exchange.size
        else:
            _copy(exchange, path)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _can_write(path: str) -> bool:
    """Asked by trying: modes say nothing of what else confines this process."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _file_name(key: str) -> str:
    name = os.fsdecode(os.fsencode(key.rpartition("/")[2])[-NAME_BYTES:])
    return name if name not in ("", ".", "..") else "object"


def _copy(exchange: Exchange, path: str) -> None:
    if exchange.size > FILE_SIZE:
        raise SampleFailure(
            f"the object has {exchange.size} bytes, of which a worker copies at most {FILE_SIZE}; use kind stream, or "
            "keep it in a directory bucket as a file that the node cannot write to, which needs no copy"
        )
    with open(path, "wb") as file:
        position = 0
        while position < exchange.size:
            position += file.write(exchange.read(position, _COPIED))
    os.chmod(path, 0o444)
