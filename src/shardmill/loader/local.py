"""The trainer's twin of an in-store transform: the same function, seeded as a worker would, on plain shards."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shardmill.core.errors import TransformFailed
from shardmill.core.refs import ObjectRef
from shardmill.shards.decoding import Decoder
from shardmill.shards.payloads import NpyPayload, Payload
from shardmill.worker.calls import SampleFailure
from shardmill.worker.samples import SampleWork, SourceSample
from shardmill.worker.seeding import Seeder, sample_seed

if TYPE_CHECKING:
    import numpy as np

Sample = dict[str, Any]

_NO_OWNER = [0, 0o444, 0, 0, "", ""]


class LocalFunction:
    """Calls a function as a worker of a node does, and gives what would come out of the shard.

    The process's own generators (`random`, numpy's, torch's) are seeded for each call and go on afterwards where they
    stood, so a trainer that draws from them in another thread would disturb both.

    Args:
        function: Takes a sample (a dict), gives one, None or an iterable of them.
        decoder: As `wd_decoder` of `WDTransform`.
        seed: Of the run.
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any], decoder: str | None, *, seed: int) -> None:
        self._function = function
        self._work = SampleWork(Decoder(decoder))
        self._seed = seed
        self._seeder = Seeder()
        self._seeder.install()

    def __call__(
        self, ref: ObjectRef, epoch: int, ordinal: int, key: str, payloads: dict[str, bytes]
    ) -> Iterator[tuple[str, Mapping[str, "bytes | np.ndarray[Any, Any]"]]]:
        """What the function gives for one sample: keys, and fields as they would stand in the transformed shard.

        Args:
            ref: Its shard.
            epoch: Of the run.
            ordinal: Its place in the shard, from 0.
            key: Its key.
            payloads: Its fields.

        Raises:
            TransformFailed: It raised, or gave something else.
        """
        with self._in_work(ref, epoch, ordinal, key, payloads) as (sample, values):
            outputs = list(self._work.apply([self._function], sample, values))
        for output in outputs:
            yield output.key, {field.name[len(output.key) + 1 :]: _value_of(field.payload) for field in output.fields}

    def call(self, ref: ObjectRef, epoch: int, ordinal: int, key: str, payloads: dict[str, bytes]) -> int:
        """The number of samples that it gives: what a trainer pays that goes on with them as they are."""
        with self._in_work(ref, epoch, ordinal, key, payloads) as (sample, values):
            return self._work.call([self._function], sample, values)

    @contextlib.contextmanager
    def _in_work(
        self, ref: ObjectRef, epoch: int, ordinal: int, key: str, payloads: dict[str, bytes]
    ) -> Iterator[tuple[SourceSample, Sample]]:
        """One sample, decoded, with generators that are seeded for it."""
        fields: list[list[Any]] = [[name, 0, len(data), *_NO_OWNER] for name, data in payloads.items()]
        sample = SourceSample(key, ordinal, str(ref), -1, fields)
        try:
            values = self._work.decode_payloads(sample, payloads)
            with self._seeder.lent(sample_seed(self._seed, epoch, ref.key, ordinal, key)):
                yield sample, values
        except SampleFailure as failure:
            raise TransformFailed(f"{failure.message} (sample {key!r} of {ref})", traceback=failure.traceback) from None

    def close(self) -> None:
        """Leave the process's generators as they were before."""
        self._seeder.uninstall()


def _value_of(payload: Payload) -> "bytes | np.ndarray[Any, Any]":
    """An array is what reading it back would give; anything else has to be encoded to know."""
    if isinstance(payload, NpyPayload):
        return payload.array
    data = bytearray(payload.size)
    payload.write_into(memoryview(data))
    return bytes(data)
