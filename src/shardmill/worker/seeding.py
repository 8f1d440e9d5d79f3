"""One seed per sample, so that bytes do not depend on which worker runs what, or in which order.

seed = blake2b-64 over (object key, ordinal, sample key), keyed by (run seed, epoch). It covers `random`, numpy's legacy
state, `np.random.default_rng()` without a seed, and torch's default generator.
"""

import contextlib
import importlib.util
import random
import struct
import sys
from collections.abc import Callable, Iterator
from hashlib import blake2b
from importlib.machinery import ModuleSpec
from types import ModuleType
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
        self._value: int | None = None
        self._fresh: random.Random | None = None
        self._numpy_random: Any = None
        self._default_rng: Callable[..., Any] | None = None
        self._torch_generator: Any = None
        self._marked: dict[str, object] = {}
        self._finder: Any = None
        self._patched: list[Any] = []
        self.drawn = 0
        """How often `default_rng()` was called without a seed since `seed`."""

    def install(self) -> None:
        """Take over the generators of the libraries that are loaded, and of those that ever will be.

        Before the user's code is loaded: what it takes from numpy by name must be what seeds itself.
        """
        self._take_over()
        self._finder = _LateImports({"numpy.random", "torch"} - set(sys.modules), self._on_late_import)
        sys.meta_path.insert(0, self._finder)

    def uninstall(self) -> None:
        """Undo `install`, in a process that lives on."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for module in self._patched:
            if module.default_rng == self._seeded_default_rng:
                module.default_rng = self._default_rng
        self._patched.clear()

    def _take_over(self) -> None:
        random_module = sys.modules.get("numpy.random")
        if random_module is not None and self._default_rng is None:
            self._numpy_random = random_module
            self._default_rng = random_module.default_rng
            modules: list[Any] = [random_module, sys.modules.get("numpy.random._generator")]
            for module in modules:
                if module is not None:
                    module.default_rng = self._seeded_default_rng
                    self._patched.append(module)
        torch = sys.modules.get("torch")
        if torch is not None and self._torch_generator is None:
            self._torch_generator = getattr(torch, "default_generator", None)

    def _on_late_import(self) -> None:
        """In the middle of a sample, as if it had been there before."""
        self._take_over()
        if self._value is not None:
            self._seed_libraries(self._value)
            self._marked = self._states() | self._marked

    def seed(self, value: int) -> None:
        """Start all generators from `value` (64 bits); 14 µs."""
        self._value = value
        random.seed(value)
        self._fresh = None
        self.drawn = 0
        self._seed_libraries(value)

    def _seed_libraries(self, value: int) -> None:
        if self._numpy_random is not None:
            self._numpy_random.seed(value & 0xFFFFFFFF)
        if self._torch_generator is not None:
            # torch.manual_seed walks all devices and costs 293 µs.
            self._torch_generator.manual_seed(value & (2**63 - 1))

    @contextlib.contextmanager
    def lent(self, value: int) -> Iterator[None]:
        """Start all generators from `value` for as long as this lasts; then they go on where they stood.

        For a process that draws for itself as well; a worker does not.
        """
        state = random.getstate()
        numpy_state = self._numpy_random.get_state() if self._numpy_random is not None else None
        torch_state = self._torch_generator.get_state() if self._torch_generator is not None else None
        self.seed(value)
        try:
            yield
        finally:
            self._value = self._fresh = None
            random.setstate(state)
            if numpy_state is not None:
                self._numpy_random.set_state(numpy_state)
            if torch_state is not None:
                self._torch_generator.set_state(torch_state)

    def mark(self) -> None:
        """Remember where the generators are; for probes."""
        self._marked = self._states()

    def has_moved(self) -> bool:
        """Whether anything was drawn since `mark`."""
        return self._states() != self._marked

    def _states(self) -> dict[str, object]:
        states: dict[str, object] = {"random": random.getstate(), "drawn": self.drawn}
        if self._numpy_random is not None:
            name, keys, *rest = self._numpy_random.get_state()
            states["numpy"] = (name, keys.tobytes(), *rest)
        if self._torch_generator is not None:
            states["torch"] = self._torch_generator.get_state().numpy().tobytes()
        return states

    def _seeded_default_rng(self, seed: Any = None) -> Any:
        assert self._default_rng is not None
        if seed is None and self._value is not None:
            if self._fresh is None:
                self._fresh = random.Random(self._value ^ 0x9E3779B97F4A7C15)
            self.drawn += 1
            seed = self._fresh.getrandbits(128)
        return self._default_rng(seed)


class _LateImports:
    """A finder that finds nothing by itself, but tells when one of some modules has been imported."""

    def __init__(self, names: set[str], on_import: Callable[[], None]) -> None:
        self._names = names
        self._on_import = on_import

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self._names:
            return None
        # Only once: the search below passes here too.
        self._names.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self._on_import()

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]  # of this one loader
        return spec
