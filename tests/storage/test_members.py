"""Indexes of members on disk and in memory: one build a version, bounded, joined, cancelled, made again."""

import asyncio
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shardmill.core.errors import BadShard, Conflict, ObjectChanged
from shardmill.core.meta import ObjectMeta
from shardmill.core.refs import ObjectRef
from shardmill.core.sources import Source
from shardmill.storage import members as members_module
from shardmill.storage.members import MemberIndexes
from tests.shards.archives import END, member, tarfile_archive
from tests.storage.support import run

REF = ObjectRef.parse("ais://pool/a.tar")


def archive(count: int, name: str = "") -> bytes:
    return tarfile_archive(
        [(tarfile.TarInfo(f"{name}{number}.txt"), b"%d" % number) for number in range(count)], tarfile.PAX_FORMAT
    )


class FileSource:
    """A shard in a file whose bytes are only there once they were asked for; counts itself and what was asked."""

    opened = 0

    def __init__(self, path: Path, version: str, asked: asyncio.Event, gate: asyncio.Event) -> None:
        self.meta = ObjectMeta("a.tar", path.stat().st_size, version, version, 0.0)
        self.descriptor = os.open(path, os.O_RDONLY)
        self.ensured: list[tuple[int, int]] = []
        self.is_changed = False
        self._asked = asked
        self._gate = gate
        FileSource.opened += 1

    @property
    def is_whole(self) -> bool:
        return False

    async def ensure(self, start: int, stop: int) -> None:
        self.ensured.append((start, stop))
        self._asked.set()
        await self._gate.wait()

    async def ensure_some(self, start: int, stop: int) -> int:
        await self.ensure(start, stop)
        return min(stop, self.meta.size)

    def release(self, position: int) -> None:
        pass

    async def check_unchanged(self) -> None:
        if self.is_changed:
            raise Conflict("it changed")

    def close(self) -> None:
        os.close(self.descriptor)
        FileSource.opened -= 1


class Shard:
    """Opens sources of one file, and keeps them to be looked at."""

    def __init__(self, directory: Path, data: bytes, version: str = "v1") -> None:
        self.path = directory / "shard.tar"
        self.path.write_bytes(data)
        self.version = version
        self.is_asked = asyncio.Event()
        self.gate = asyncio.Event()
        """Until it is set, bytes are not there."""
        self.gate.set()
        self.sources: list[FileSource] = []

    async def open(self) -> Source:
        self.sources.append(FileSource(self.path, self.version, self.is_asked, self.gate))
        return self.sources[-1]


@asynccontextmanager
async def opened(directory: Path, capacity: int = 1 << 20) -> AsyncIterator[MemberIndexes]:
    async with MemberIndexes.open_directory(directory / "members", capacity=capacity) as indexes:
        yield indexes
    assert FileSource.opened == 0


def files(directory: Path) -> list[Path]:
    return sorted((directory / "members").iterdir())


def test_many_readers_of_one_version_cause_one_build(tmp_path: Path) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(5000))
        async with opened(tmp_path) as indexes:
            found = await asyncio.gather(*(indexes.get(REF, "v1", shard.open) for _ in range(50)))
            assert len(shard.sources) == 1
            assert all(index is found[0] for index in found)
            assert len(found[0]) == 5000
            assert indexes.known(REF, "v1") is found[0]
            assert indexes.known(REF, "v2") is None
            assert indexes.statistics().built == 1

    run(story())


def test_the_next_process_reads_the_index_and_no_header(tmp_path: Path) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(100))
        async with opened(tmp_path) as indexes:
            await indexes.get(REF, "v1", shard.open)
        async with opened(tmp_path) as indexes:
            index = await indexes.get(REF, "v1", shard.open)
            assert len(shard.sources) == 1
            assert index.find(b"99.txt") is not None
            assert (indexes.statistics().built, indexes.statistics().loaded) == (0, 1)

    run(story())


def test_an_older_version_s_index_is_never_used_and_goes(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as indexes:
            await indexes.get(REF, "v1", Shard(tmp_path, archive(3, "old")).open)
            index = await indexes.get(REF, "v2", Shard(tmp_path, archive(3, "new"), "v2").open)
            assert index.find(b"old1.txt") is None
            assert index.find(b"new1.txt") is not None
            assert indexes.known(REF, "v1") is None
            assert len(files(tmp_path)) == 1
        async with opened(tmp_path) as indexes:
            with pytest.raises(BadShard):
                await indexes.get(REF, "v3", Shard(tmp_path, b"no tar", "v3").open)
            assert files(tmp_path) == []

    run(story())


def test_a_shard_that_was_replaced_before_it_was_opened_again_is_said_to_be(tmp_path: Path) -> None:
    async def story() -> None:
        async with opened(tmp_path) as indexes:
            with pytest.raises(ObjectChanged):
                await indexes.get(REF, "v1", Shard(tmp_path, archive(3), "v2").open)
            assert files(tmp_path) == []

    run(story())


@pytest.mark.parametrize("data", [archive(2000), b"no longer a tar" * 100], ids=["still a tar", "no tar any more"])
def test_what_changes_while_it_is_indexed_is_a_conflict_and_not_kept(tmp_path: Path, data: bytes) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, data)

        async def open_and_change() -> Source:
            source = await shard.open()
            shard.sources[-1].is_changed = True
            return source

        async with opened(tmp_path) as indexes:
            with pytest.raises(Conflict):
                await indexes.get(REF, "v1", open_and_change)
            assert files(tmp_path) == []
            assert indexes.known(REF, "v1") is None

    run(story())


def test_a_damaged_shard_is_read_through_once(tmp_path: Path) -> None:
    async def story() -> None:
        damaged = bytearray(archive(10))
        damaged[5 << 10] ^= 1
        shard = Shard(tmp_path, bytes(damaged))
        async with opened(tmp_path) as indexes:
            for _ in range(3):
                with pytest.raises(BadShard, match=r"ais://pool/a\.tar: bad checksum"):
                    await indexes.get(REF, "v1", shard.open)
            assert len(shard.sources) == 1

    run(story())


def test_headers_are_read_only_where_bytes_were_made_sure_of(tmp_path: Path) -> None:
    """Payloads between them are not asked for, as far as whole steps leave them out."""
    big = 8 << 20

    async def story() -> None:
        shard = Shard(tmp_path, b"".join(member(b"%d.bin" % number, bytes(big)) for number in range(4)) + END)
        async with opened(tmp_path) as indexes:
            assert len(await indexes.get(REF, "v1", shard.open)) == 4
        (source,) = shard.sources
        assert sum(stop - start for start, stop in source.ensured) < 6 << 20
        for number in range(4):
            place = number * (big + 512)
            assert any(start <= place and place + 512 <= stop for start, stop in source.ensured)

    run(story())


def test_a_reader_who_leaves_does_not_end_the_build_for_others_and_the_last_does(tmp_path: Path) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(100))
        shard.gate.clear()
        async with opened(tmp_path) as indexes:
            first = asyncio.create_task(indexes.get(REF, "v1", shard.open))
            second = asyncio.create_task(indexes.get(REF, "v1", shard.open))
            await shard.is_asked.wait()
            first.cancel()
            await asyncio.wait([first])
            assert (first.cancelled(), FileSource.opened) == (True, 1)
            second.cancel()
            await asyncio.wait([second])
            assert (second.cancelled(), FileSource.opened) == (True, 0)
            shard.gate.set()
            assert len(await indexes.get(REF, "v1", shard.open)) == 100
            assert len(shard.sources) == 2

    run(story())


def test_closing_ends_what_is_being_built(tmp_path: Path) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(100))
        shard.gate.clear()
        async with opened(tmp_path) as indexes:
            reader = asyncio.create_task(indexes.get(REF, "v1", shard.open))
            await shard.is_asked.wait()
        await asyncio.wait([reader])
        assert reader.cancelled()

    run(story())


def test_disk_is_bounded_and_the_least_used_leave_first(tmp_path: Path) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(100))
        refs = [ObjectRef.parse(f"ais://pool/{number}.tar") for number in range(4)]
        async with opened(tmp_path) as indexes:
            size = (await indexes.get(REF, "v1", shard.open)).nbytes
            await indexes.forget(REF)
            assert files(tmp_path) == []
            assert indexes.known(REF, "v1") is None
        async with opened(tmp_path, capacity=3 * size + size // 2) as indexes:
            for ref in refs[:3]:
                await indexes.get(ref, "v1", shard.open)
        for number, path in enumerate(files(tmp_path)):
            os.utime(path, (number, number))
        async with opened(tmp_path, capacity=3 * size + size // 2) as indexes:
            oldest = files(tmp_path)[0].name
            used = next(ref for ref in refs if members_module._file_name(ref) == oldest)
            await indexes.get(used, "v1", shard.open)
            kept = files(tmp_path)[1].name
            await indexes.get(refs[3], "v1", shard.open)
            assert indexes.statistics().on_disk <= 3 * size + size // 2
            names = {path.name for path in files(tmp_path)}
            assert oldest in names
            assert kept not in names
        (tmp_path / "members" / "left.new").write_bytes(b"half")
        async with opened(tmp_path, capacity=size + size // 2) as indexes:
            assert len(files(tmp_path)) == 1
            assert indexes.statistics().on_disk == size

        async with opened(tmp_path, capacity=size // 2) as indexes:
            assert len(await indexes.get(REF, "v1", shard.open)) == 100
            assert files(tmp_path) == []

    run(story())


def test_memory_is_bounded_but_the_last_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(100))
        refs = [ObjectRef.parse(f"ais://pool/{number}.tar") for number in range(3)]
        async with opened(tmp_path) as indexes:
            size = (await indexes.get(refs[0], "v1", shard.open)).nbytes
            monkeypatch.setattr(members_module, "IN_MEMORY", 2 * size + size // 2)
            for ref in refs:
                await indexes.get(ref, "v1", shard.open)
            assert [indexes.known(ref, "v1") is not None for ref in refs] == [False, True, True]
            assert indexes.statistics().in_memory == 2 * size
            monkeypatch.setattr(members_module, "IN_MEMORY", 0)
            await indexes.get(refs[0], "v1", shard.open)
            assert [indexes.known(ref, "v1") is not None for ref in refs] == [True, False, False]

    run(story())


def test_a_disk_that_takes_nothing_keeps_no_reader_from_the_index(tmp_path: Path) -> None:
    async def story() -> None:
        shard = Shard(tmp_path, archive(100))
        async with opened(tmp_path) as indexes:
            (tmp_path / "members").rmdir()
            assert len(await indexes.get(REF, "v1", shard.open)) == 100
            assert indexes.statistics().on_disk == 0

    run(story())


def test_a_shard_of_very_many_members_takes_little_memory(tmp_path: Path) -> None:
    """A million would be 35 MB. Headers that tarfile takes minutes to write are made from one another here."""
    count, block = 100_000, member(b"0000000.jpg")
    head, tail = block[7:148], block[156:]
    rest = sum(head) + sum(tail) + 8 * 32

    def header(number: int) -> bytes:
        name = b"%07d" % number
        return name + head + b"%06o\0 " % (rest + sum(name)) + tail

    async def story() -> None:
        shard = Shard(tmp_path, b"".join(map(header, range(count))) + END)
        async with opened(tmp_path, capacity=1 << 30) as indexes:
            index = await indexes.get(REF, "v1", shard.open)
            assert len(index) == count
            found = index.find(b"%07d.jpg" % (count - 1))
            assert found is not None
            assert (found.ordinal, found.offset, found.size) == (count - 1, count * 512, 0)
            assert index.nbytes == indexes.statistics().on_disk < 36 * count

    run(story())
