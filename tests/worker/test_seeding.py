"""One seed per sample: the same draws whatever the worker, the order and the batch, for everything that is covered."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.worker.seeding import Seeder, sample_seed
from tests.etl.support import write_shard
from tests.worker.driving import DrivenWorker, DrivenZygote, described, zygote

DRAWS = """
    import random
    from random import random as drawn_by_name

    import numpy as np
    from numpy.random import default_rng
    from numpy.random import rand

    own = np.random.default_rng

    def transform(sample):
        draws = [
            random.random(), drawn_by_name(), random.getrandbits(70), random.gauss(0, 1), random.sample(range(99), 3),
            np.random.rand(), rand(), int(np.random.randint(1 << 30)), np.random.permutation(9).tolist(),
            np.random.default_rng().random(), default_rng().random(), own().random(), default_rng(None).random(),
            list({"a", "b", "c", sample["__key__"]}),
        ]
        sample["json"] = [draws, default_rng(5).random()]
        return sample
"""
LATE = """
    def transform(sample):
        from numpy.random import default_rng, rand
        import numpy.random as np_random

        sample["json"] = [[default_rng().random(), rand(), np_random.default_rng().integers(1 << 30).item()], 0]
        return sample
"""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"txt": b"%d" % ordinal} for ordinal in range(24)]
    return write_shard(tmp_path_factory.mktemp("seeding") / "s.tar", samples)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[DrivenZygote]:
    """Has imported nothing by itself."""
    with zygote(tmp_path) as started:
        yield started


def worker_with(started: DrivenZygote, shard: Path, source: str) -> DrivenWorker:
    worker = started.fork()
    loaded = worker.load(source)
    assert loaded.head["t"] == "loaded", loaded.head
    worker.open(shard)
    return worker


def by_ordinal(worker: DrivenWorker, samples: list[list[Any]], **how: int) -> dict[int, list[bytes]]:
    results = worker.run(samples, **how)
    assert all(outcome[0] == "out" for outcome in results.outcomes.values()), results.outcomes
    return results.outputs


@pytest.mark.parametrize("source", [DRAWS, LATE], ids=["draws", "late imports"])
@pytest.mark.parametrize("preloaded", [True, False], ids=["preloaded", "bare"])
def test_forwards_backwards_and_over_workers_the_bytes_are_the_same(
    bare: DrivenZygote, shard: Path, source: str, preloaded: bool
) -> None:
    if preloaded:
        assert bare.preload("numpy")["failed"] == {}
    samples = described(shard)
    first = worker_with(bare, shard, source)
    expected = by_ordinal(first, samples)
    assert by_ordinal(first, samples[::-1]) == expected
    others = [worker_with(bare, shard, source) for _ in range(3)]
    scattered: dict[int, list[bytes]] = {}
    for turn, sample in enumerate(samples[7:] + samples[:7]):
        scattered |= by_ordinal(others[turn % 3], [sample])
    assert scattered == expected
    assert len({data for pieces in expected.values() for data in pieces}) == len(samples)
    for how in ({"epoch": 1}, {"seed": 2}):
        again = by_ordinal(first, samples, **how)
        assert all(again[ordinal] != expected[ordinal] for ordinal in expected)


def test_a_function_that_seeds_for_itself_is_left_alone(bare: DrivenZygote, shard: Path) -> None:
    source = """
        import random
        import numpy as np

        def transform(sample):
            random.seed(5)
            sample["json"] = [random.random(), np.random.default_rng(7).random(), np.random.Generator(np.random.PCG64(9)).random()]
            return sample
    """
    samples = described(shard)[:2]
    outputs = by_ordinal(worker_with(bare, shard, source), samples)
    expected = numpy.random.default_rng(7).random(), numpy.random.Generator(numpy.random.PCG64(9)).random()
    for (data,) in outputs.values():
        assert str(expected[0]).encode() in data
        assert str(expected[1]).encode() in data


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("pass", False),
        ("random.Random(3).random()", False),
        ("random.random()", True),
        ("np.random.rand()", True),
        ("np.random.default_rng()", True),
        ("np.random.default_rng(4).random()", False),
    ],
)
def test_a_probe_is_told_whether_a_generator_moved(bare: DrivenZygote, shard: Path, line: str, moved: bool) -> None:
    worker = bare.fork()
    worker.load(
        f"import random\nimport numpy as np\ndef transform(sample):\n    {line}\n    return sample\n", probe=True
    )
    worker.open(shard)
    outcome = worker.run(described(shard)[:1]).outcomes[0]
    assert outcome[0] == "out"
    assert outcome[-1] is moved


NAMES = st.text(max_size=20)


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), NAMES, st.integers(0, 2**40), NAMES, st.integers(0, 4), NAMES
)
def test_every_part_decides_the_seed(
    seed: int, epoch: int, object_key: str, ordinal: int, sample_key: str, part: int, other: str
) -> None:
    parts: list[Any] = [seed, epoch, object_key, ordinal, sample_key]
    value = sample_seed(*parts)
    assert 0 <= value < 2**64
    assert value == sample_seed(*parts)
    changed = list(parts)
    changed[part] = changed[part] + 1 if isinstance(changed[part], int) else changed[part] + "x" + other
    if not any(isinstance(item, int) and item >= 2**64 for item in changed):
        assert sample_seed(*changed) != value


def test_names_do_not_run_into_each_other() -> None:
    assert sample_seed(1, 0, "ab", 0, "c") != sample_seed(1, 0, "a", 0, "bc")


def test_seeds_are_the_same_in_every_release() -> None:
    """Kept results and papers depend on them; a change needs another format version."""
    assert sample_seed(0, 0, "a.tar", 0, "0000") == SEEDS[0]
    assert sample_seed(2**63 - 1, 7, "train/\udcff.tar", 10**6, "ä\udc80") == SEEDS[1]


SEEDS = (4674603847379852860, 113845445444122600)


def test_seeding_this_process_reaches_numpy_only_through_what_it_took_over() -> None:
    with seeder_installed() as seeder:
        seeder.seed(5)
        first = numpy.random.default_rng().random(), numpy.random.rand()
        assert seeder.drawn == 1
        seeder.seed(5)
        assert (numpy.random.default_rng().random(), numpy.random.rand()) == first
        seeder.seed(6)
        assert numpy.random.default_rng().random() != first[0]


@contextlib.contextmanager
def seeder_installed() -> Iterator[Seeder]:
    """Taken back afterwards: this process is not a worker."""
    import random

    from numpy.random import _generator

    states = random.getstate(), numpy.random.get_state()
    original, finders = numpy.random.default_rng, list(sys.meta_path)
    seeder = Seeder()
    try:
        seeder.install()
        yield seeder
    finally:
        numpy.random.default_rng = _generator.default_rng = original
        sys.meta_path[:] = finders
        random.setstate(states[0])
        numpy.random.set_state(states[1])
