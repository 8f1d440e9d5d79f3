"""One seed per sample, so that bytes do not depend on which worker runs what, or in which order.

seed = blake2b-64 over (object key, ordinal, sample key), keyed by (run seed, epoch). It covers `random`, numpy's legacy
state, `np.random.default_rng()` without a seed, and torch's default generator.
"""

import random
import struct
import sys
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

_KEY = struct.Struct("<QQ")
_ORDINAL = struct.Struct("<Q")


def sample_seed(seed: int, epoch: int, object_key: str, ordinal: int, sample_key: str) -> int:
    """64 bits for one sample."""
    digest = blake2b(digest_size=8, key=_KEY.pack(seed, epoch))
    name = object_key.encode("utf-8", "surrogateescape")
    digest.update(_ORDINAL.pack(len(name)) + name + _ORDINAL.pack(ordinal))
    digest.update(sample_key.encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest(), "little")


class Seeder:
    """Seeds the generators of this process before each sample."""

    def __init__(self) -> None:
        self._fresh: random.Random | None = None
        self._numpy_random: Any = None
        self._default_rng: Callable[..., Any] | None = None
        self._torch_generator: Any = None
        self.drawn = 0
        """How often `default_rng()` was called without a seed since `seed`."""

    def install(self) -> None:
        """Find the libraries that are loaded by now and make `default_rng()` draw its seed from the sample's."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and self._default_rng is None:
            self._numpy_random = numpy.random
            self._default_rng = numpy.random.default_rng
            modules: list[Any] = [numpy.random, sys.modules.get("numpy.random._generator")]
            for module in modules:
                if module is not None:
                    module.default_rng = self._seeded_default_rng
        torch = sys.modules.get("torch")
        if torch is not None and self._torch_generator is None:
            self._torch_generator = getattr(torch, "default_generator", None)

    def seed(self, value: int) -> None:
        """Start all generators from `value` (64 bits); 14 µs."""
        random.seed(value)
        self._fresh = random.Random(value ^ 0x9E3779B97F4A7C15)
        self.drawn = 0
        if self._numpy_random is not None:
            self._numpy_random.seed(value & 0xFFFFFFFF)
        if self._torch_generator is not None:
            # torch.manual_seed walks all devices and costs 293 µs.
            self._torch_generator.manual_seed(value & (2**63 - 1))

    def state(self) -> tuple[object, ...]:
        """A value that changes when any of the generators moved; for probes."""
        states: list[object] = [random.getstate(), self.drawn]
        if self._numpy_random is not None:
            name, keys, *rest = self._numpy_random.get_state()
            states.append((name, keys.tobytes(), *rest))
        if self._torch_generator is not None:
            states.append(self._torch_generator.get_state().numpy().tobytes())
        return tuple(states)

    def _seeded_default_rng(self, seed: Any = None) -> Any:
        assert self._default_rng is not None
        if seed is None and self._fresh is not None:
            self.drawn += 1
            seed = self._fresh.getrandbits(128)
        return self._default_rng(seed)
