"""Tar archives for tests: raw headers with anything wrong in them, tarfile's formats, JPEG shards."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shardmill.shards import Member, TarHeaders

BLOCK = 512
END = bytes(1024)


def header(
    name: bytes = b"000.txt",
    size: int | bytes = 0,
    *,
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    mtime: bytes = b"00000000000\0",
    checksum: bytes | None = None,
    uname: bytes = b"someone",
    devices: bytes = bytes(16),
) -> bytes:
    """One header block; `size` as bytes is written as it stands."""
    size_field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    head = name.ljust(100, b"\0") + b"0000644\x000001750\x000001750\0" + size_field + mtime
    tail = (
        kind + bytes(100) + magic + uname.ljust(32, b"\0") + bytes(32) + devices + prefix.ljust(155, b"\0") + bytes(12)
    )
    total = sum(head) + sum(tail) + 8 * 32
    return head + (b"%06o\0 " % total if checksum is None else checksum.ljust(8, b"\0")) + tail


def member(name: bytes = b"000.txt", payload: bytes = b"", kind: bytes = b"0") -> bytes:
    """A whole member: header, payload, padding."""
    return header(name, len(payload), kind=kind) + payload + bytes(-len(payload) % BLOCK)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """A pax header of records as they stand."""
    return member(b"././@PaxHeader", b"".join(records), kind)


def record(keyword: bytes, value: bytes) -> bytes:
    """A well-formed pax record."""
    length = len(keyword) + len(value) + 3
    while length != len(keyword) + len(value) + 3 + len(str(length)):
        length = len(keyword) + len(value) + 3 + len(str(length))
    return b"%d %s=%s\n" % (length, keyword, value)


def reader(data: bytes) -> Callable[[int, int], bytes]:
    """`os.pread` over bytes."""
    return lambda offset, length: data[offset : offset + length]


def headers_of(data: bytes) -> TarHeaders:
    return TarHeaders(reader(data), len(data))


def read_all(headers: TarHeaders) -> list[Member]:
    members = []
    while (found := headers.next_member()) is not None:
        members.append(found)
    return members


def members_of(data: bytes) -> list[Member]:
    return read_all(headers_of(data))


def tarfile_archive(infos: Iterable[tuple[tarfile.TarInfo, bytes]], form: int, **options: object) -> bytes:
    """An archive as Python's tarfile writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, **options) as archive:  # type: ignore[call-overload]
        for info, payload in infos:
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def simple_shard(samples: Sequence[tuple[str, dict[str, bytes]]]) -> bytes:
    """A ustar shard of samples in the given order."""
    return tarfile_archive(
        [(tarfile.TarInfo(f"{key}.{field}"), data) for key, fields in samples for field, data in fields.items()],
        tarfile.USTAR_FORMAT,
    )


def make_picture_shards(directory: Path) -> list[Path]:
    """JPEG shards as a data set would have them, made here."""
    import numpy as np
    import PIL.Image

    numbers = np.random.default_rng(20261124)
    paths = []
    for shard in range(2):
        samples = []
        for ordinal in range(12):
            height, width = (int(side) for side in numbers.integers(40, 200, 2))
            plane = numbers.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
            picture = PIL.Image.fromarray(plane).resize((width, height)).convert("L" if ordinal == 5 else "RGB")
            stream = io.BytesIO()
            picture.save(stream, "JPEG")
            key = f"{shard * 1000 + ordinal:08d}"
            samples.append((key, {"cls": b"%d" % (ordinal % 10), "jpg": stream.getvalue()}))
        path = directory / f"imagenet-train-{shard:06d}.tar"
        path.write_bytes(simple_shard(samples))
        paths.append(path)
    return paths


def picture_shards(directory: Path) -> list[Path]:
    """Real shards where `SHARDMILL_TEST_SHARDS` names their directory, else made ones."""
    if given := os.environ.get("SHARDMILL_TEST_SHARDS"):
        paths = sorted(Path(given).glob("*.tar"))
        assert paths, f"SHARDMILL_TEST_SHARDS={given} has no *.tar"
        return paths
    return make_picture_shards(directory)
