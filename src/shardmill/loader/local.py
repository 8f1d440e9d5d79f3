"""The trainer's twin of an in-store transform: the same function, seeded as a worker would, on plain shards."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shardmill.core.errors import TransformFailed
from shardmill.core.refs import ObjectRef
from shardmill.shards.decoding import Decoder
from shardmill.worker.seeding import Seeder, sample_seed

Sample = dict[str, Any]
Function = Callable[[Sample], Any]


class LocalFunction:
    """Calls a function as a worker of a node does.

    The process's own generators (`random`, numpy's, torch's) are seeded before each sample, as they are in a worker.

    Args:
        function: Takes a sample (a dict), gives one, None or an iterable of them.
        decoder: As `wd_decoder` of `WDTransform`.
        seed: Of the run.
        epoch: Of the run.
    """

    def __init__(
        self, function: Callable[[dict[str, Any]], Any], decoder: str | None, *, seed: int, epoch: int
    ) -> None:
        self._function = function
        self._decoder = Decoder(decoder)
        self._seed, self._epoch = seed, epoch
        self._seeder = Seeder()

    def __call__(
        self, ref: ObjectRef, ordinal: int, key: str, payloads: Mapping[str, bytes]
    ) -> Iterator[dict[str, Any]]:
        """What the function gives for one sample.

        Raises:
            TransformFailed: It raised, or gave something else.
        """
        sample: dict[str, Any] = {"__key__": key, "__url__": str(ref)}
        try:
            for name, data in payloads.items():
                sample[name] = self._decoder.decode(name, data)
            self._seeder.install()
            self._seeder.seed(sample_seed(self._seed, self._epoch, ref.key, ordinal, key))
            result = self._function(copy.copy(sample))
            if result is None:
                return
            if isinstance(result, Mapping):
                yield dict(result)
                return
            if isinstance(result, (str, bytes)) or not isinstance(result, Iterable):
                raise TypeError(f"the function gave {type(result).__name__}, not a sample")
            for item in result:
                yield dict(item)
        except Exception as error:
            raise TransformFailed(f"sample {key!r} of {ref}: {type(error).__name__}: {error}") from error
