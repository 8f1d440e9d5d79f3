"""One sample through a function: decode, call, tell touched fields from untouched ones, encode.

Untouched fields pass through byte for byte. A field counts as touched when its object or its content changed.
"""

import contextlib
import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmill.shards.decoding import Decoder
from shardmill.shards.encoding import encode
from shardmill.shards.framing import FramedField, frame_into, framed_size
from shardmill.shards.payloads import BytesPayload, Payload
from shardmill.shards.writing import member_name, member_order
from shardmill.worker.calls import Function, SampleFailure, failure_of

_IMMUTABLE = (str, bytes, int, float, complex, bool, type(None))
_GONE = object()


class SourceChanged(OSError):
    """The shard is shorter than its headers said: it changed while it was read."""


@dataclass(slots=True)
class SourceSample:
    """A sample as the node describes it: where its fields stand in the shard."""

    key: str
    ordinal: int
    url: str
    """`provider://bucket/key` of the shard."""
    descriptor: int
    fields: list[list[Any]]
    """`[field, offset, size, mtime, mode, uid, gid, uname, gname]` in tar order."""

    @property
    def size(self) -> int:
        """Payload bytes of all fields."""
        return sum(field[2] for field in self.fields)


@dataclass(slots=True)
class Output:
    """One encoded sample, ready to be framed."""

    key: str
    fields: list[FramedField]
    size: int
    """Bytes once framed."""

    def frame_into(self, view: memoryview) -> int:
        """Write it; returns the safe cut (see `shards.framing`)."""
        return frame_into(view, self.fields)


class SampleWork:
    """Turns source samples into outputs and keeps the clock of each stage."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._raw: dict[str, bytes] = {}
        self._seconds = [0.0, 0.0, 0.0, 0.0]
        self._mark = 0.0

    def start_clock(self) -> None:
        self._mark = time.perf_counter()

    def take_clock(self) -> list[float]:
        """Seconds in read, decode, user code and encode since the last call."""
        self._lap(3)
        taken, self._seconds = self._seconds, [0.0, 0.0, 0.0, 0.0]
        return [round(value, 7) for value in taken]

    def _lap(self, stage: int) -> None:
        now = time.perf_counter()
        self._seconds[stage] += now - self._mark
        self._mark = now

    def decode(self, sample: SourceSample) -> dict[str, Any]:
        """The sample as WebDataset would hand it on: decoded fields, `__key__` and `__url__`.

        Raises:
            SampleFailure: A field cannot be decoded, or does not fit into memory.
            SourceChanged: The shard ends early.
        """
        self._lap(3)
        try:
            payloads = {field[0]: _read(sample.descriptor, field[1], field[2]) for field in sample.fields}
        except MemoryError as error:
            raise failure_of(error, f"sample {sample.key!r} of {sample.size} bytes cannot be read") from None
        self._lap(0)
        return self.decode_payloads(sample, payloads)

    def decode_payloads(self, sample: SourceSample, payloads: dict[str, bytes]) -> dict[str, Any]:
        """The sample from the bytes of its fields, which have been read.

        Raises:
            SampleFailure: A field cannot be decoded.
        """
        self._raw = payloads
        values: dict[str, Any] = {"__key__": sample.key, "__url__": sample.url}
        for name, data in self._raw.items():
            try:
                values[name] = self._decoder.decode(name, data)
            except BaseException as error:
                raise failure_of(error, f"field {name!r} of sample {sample.key!r} cannot be decoded") from None
        self._lap(1)
        return values

    def apply(self, functions: Sequence[Function], sample: SourceSample, values: dict[str, Any]) -> Iterator[Output]:
        """Call the functions, each on what the one before it gives, and encode what the last gives.

        Each gives a dict, None, or an iterable of dicts.

        Raises:
            SampleFailure: One raised, or gave what cannot be encoded.
        """
        with _failing(sample):
            yield from self._outputs(functions, sample, values)

    def call(self, functions: Sequence[Function], sample: SourceSample, values: dict[str, Any]) -> int:
        """As `apply`, but what the last gives is only counted."""
        with _failing(sample):
            return sum(1 for _ in self._chain(functions, sample.key, values))

    def _outputs(self, functions: Sequence[Function], sample: SourceSample, values: dict[str, Any]) -> Iterator[Output]:
        originals = {name: _without_holding(value) for name, value in values.items()}
        for key, result in self._chain(functions, sample.key, values):
            yield self._encode(sample, originals, key, result)

    def _chain(
        self, functions: Sequence[Function], key: str, values: dict[str, Any]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What the last function gives, sample by sample, with their keys."""
        function, *others = functions
        for given_key, result in self._call(function, key, values):
            if others:
                url = values["__url__"]
                yield from self._chain(others, given_key, {"__url__": url, **result, "__key__": given_key})
            else:
                yield given_key, result

    def _call(self, function: Function, key: str, values: dict[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        result = function(values)
        self._lap(2)
        if result is None:
            return
        if isinstance(result, Mapping):
            yield _key_of(result, key, None), result
            return
        if isinstance(result, (str, bytes, bytearray)) or not isinstance(result, Iterable):
            raise SampleFailure(
                f"sample {key!r}: the function returned {type(result).__name__}; "
                "return the sample (a dict), None to drop it, or an iterable of samples"
            )
        for index, item in enumerate(result):
            self._lap(2)
            if not isinstance(item, Mapping):
                raise SampleFailure(f"sample {key!r}: item {index} is {type(item).__name__}, not a dict")
            yield _key_of(item, key, index), item

    def _encode(
        self, sample: SourceSample, originals: dict[str, Callable[[], Any]], key: str, result: Mapping[str, Any]
    ) -> Output:
        headers = {field[0]: field[3:] for field in sample.fields}
        first = sample.fields[0][3:]
        names = member_order([name for name in result if isinstance(name, str)])
        if len({name.lower() for name in names}) < len(names):
            raise SampleFailure(f"sample {key!r} has fields that differ only in case: {', '.join(names)}")
        fields: list[FramedField] = []
        for name in names:
            payload = self._payload(name, result[name], originals, sample)
            mtime, mode, uid, gid, uname, gname = headers.get(name, first)
            # A source's own names have been read as this key and field before.
            member = f"{key}.{name}" if key == sample.key and name in headers else _member_name(key, name)
            fields.append(
                FramedField(
                    member,
                    payload,
                    mtime=mtime,
                    mode=mode,
                    uid=uid,
                    gid=gid,
                    uname=uname,
                    gname=gname,
                    ordinal=None if fields else sample.ordinal,
                )
            )
        self._lap(3)
        return Output(key, fields, framed_size(fields))

    def _payload(self, name: str, value: Any, originals: dict[str, Callable[[], Any]], sample: SourceSample) -> Payload:
        raw = self._raw.get(name)
        if raw is not None and value is originals[name]() and self._is_unchanged(name, value, raw):
            return BytesPayload(raw)
        try:
            return encode(name, value)
        except BaseException as error:
            raise failure_of(error, f"field {name!r} of sample {sample.key!r} cannot be encoded") from None

    def _is_unchanged(self, name: str, value: Any, raw: bytes) -> bool:
        """Whether a kept object still has its content; edits in place keep the identity, so they are compared."""
        if isinstance(value, _IMMUTABLE):
            return True
        try:
            return is_same(value, self._decoder.decode(name, raw))
        except Exception:
            return False


def _without_holding(value: Any) -> Callable[[], Any]:
    """Gives the value, or once it is gone what nothing else is.

    A picture that the function has let go of leaves memory that the processor still has at hand to what comes next.
    """
    try:
        held = weakref.ref(value)
    except TypeError:
        return lambda: value
    # Not None, which the function may have put in its place.
    return lambda: _GONE if (found := held()) is None else found


@contextlib.contextmanager
def _failing(sample: SourceSample) -> Iterator[None]:
    try:
        yield
    except (SampleFailure, GeneratorExit):
        raise
    except BaseException as error:
        # The function's, or that of an object it gave: mappings, keys and items may be of the user's own classes.
        raise failure_of(error, f"sample {sample.key!r}") from None


def _key_of(result: Mapping[str, Any], key: str, index: int | None) -> str:
    """The key of what a function gave for the sample `key`; `index` is its place if it gave several."""
    given = result.get("__key__", key)
    if not isinstance(given, str) or not given or "\0" in given:
        raise SampleFailure(f"sample {key!r}: __key__ is {given!r}, not a name")
    return f"{key}-{index}" if index is not None and given == key else given


def is_same(left: Any, right: Any) -> bool:
    """Deep equality of decoded values, exact in type, shape and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_same, left, right))
    if hasattr(left, "tobytes") and hasattr(left, "dtype"):
        return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())
    if hasattr(left, "tobytes") and hasattr(left, "mode"):
        return bool(left.mode == right.mode and left.size == right.size and left.tobytes() == right.tobytes())
    if hasattr(left, "untyped_storage"):
        return bool(left.dtype == right.dtype and left.shape == right.shape and _bits(left) == _bits(right))
    if isinstance(left, (float, complex)):
        # Not ==: of the values that JSON gives, NaN is not equal to itself, and 0.0 is to -0.0.
        return repr(left) == repr(right)
    return bool(left == right) or (not isinstance(left, _IMMUTABLE) and pickle.dumps(left) == pickle.dumps(right))


def _bits(tensor: Any) -> bytes:
    """A torch tensor's elements; numpy has no type for some of them."""
    import torch

    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _member_name(key: str, field: str) -> str:
    try:
        return member_name(key, field)
    except ValueError as error:
        raise SampleFailure(f"sample {key!r}: {error}") from None


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise SourceChanged(f"the shard ends at byte {offset + len(data)}, its headers say more")
        data += more
    return data
