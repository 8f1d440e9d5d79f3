"""`/o/...?member=NAME` and `/api/members`: one member of a shard as if it were an object of its own."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from shardmill.core.refs import ObjectRef
from tests.server.wire import Unfinished, Wire, request, wait_for
from tests.shards.archives import END, member, tarfile_archive

MIB = 1 << 20
SHARD = "imagenet-train-000000.tar"
TRAIN = f"/o/gs/sharded-imagenet/{SHARD}"


def archive(members: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    return tarfile_archive([(tarfile.TarInfo(name), data) for name, data in members.items()], form)


def at(path: str, name: str) -> str:
    return f"{path}?member={quote(name, safe='')}"


def index_file(wire: Wire, uri: str) -> Path:
    name = hashlib.blake2b(str(ObjectRef.parse(uri)).encode(), digest_size=20).hexdigest()
    return wire.node.data / "members" / name


@pytest.fixture(scope="module")
def odd(wire: Wire) -> tuple[str, dict[str, bytes]]:
    """Path of a shard of members small and large, with names of all kinds; and what they hold."""
    choose = random.Random(3)
    members = {
        "plain.txt": b"plain",
        "empty.cls": b"",
        "a b+c&d=e%20.json": b"{}",
        "./dir/x.JPG": b"\xff\xd8",
        "Straße/日本.txt": b"other scripts",
        "long/" + "n" * 500 + ".npy": b"long name",
        "large.bin": choose.randbytes(3 * MIB + 17),
        "no suffix": b"?",
        "last.html": b"<script>",
    }
    wire.put("/o/ais/pool/odd.tar", archive(members))
    return "/o/ais/pool/odd.tar", members


def test_every_member_of_a_shard_is_read_by_its_name(wire: Wire, shards: Path) -> None:
    with tarfile.open(shards / SHARD) as judge:
        for info in list(judge)[:20] + list(judge)[-20:]:
            file = judge.extractfile(info)
            if file is not None:
                answer = wire.get(at(TRAIN, info.name))
                assert (answer.status, answer.body == file.read()) == (200, True)
                kind = "image/jpeg" if info.name.endswith(".jpg") else "text/plain"
                assert answer.headers["content-type"] == kind


def test_names_of_all_kinds_are_found_percent_encoded(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    path, members = odd
    for name, data in members.items():
        answer = wire.get(at(path, name))
        assert (answer.status, answer.body == data) == (200, True), name
        assert answer.headers["content-length"] == str(len(data))
    assert wire.get(at(path, "./dir/x.JPG")).headers["content-type"] == "image/jpeg"


def test_a_member_is_answered_as_safely_as_an_object(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    answer = wire.get(at(odd[0], "last.html"))
    assert answer.headers["content-type"] == "text/html"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "sandbox"
    assert "shardmill-checksum" not in answer.headers  # that would be the shard's


def test_head_tells_what_get_sends(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    for name in odd[1]:
        got, told = wire.get(at(odd[0], name)), wire.ask("HEAD", at(odd[0], name))
        assert told.status == 200
        for header in ("content-length", "content-type", "etag", "last-modified", "accept-ranges"):
            assert told.headers[header] == got.headers[header]


def test_ranges_are_of_the_member(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    path, members = odd
    for name in ("plain.txt", "large.bin"):
        data = members[name]
        size = len(data)
        for start, stop in ((0, 1), (1, size), (size - 2, size), (size // 3, size // 2)):
            part = wire.get(at(path, name), f"Range: bytes={start}-{stop - 1}")
            assert (part.status, part.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{size}")
            assert part.body == data[start:stop]
        assert wire.get(at(path, name), "Range: bytes=-3").body == data[-3:]
        beyond = wire.get(at(path, name), f"Range: bytes={size}-")
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert wire.get(at(path, "plain.txt"), "Range: bytes=0-99999").body == b"plain"
    assert wire.get(at(path, "empty.cls"), "Range: bytes=0-").status == 416


def test_conditions_are_of_the_member(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    path = odd[0]
    etags = {name: wire.get(at(path, name)).headers["etag"] for name in odd[1]}
    assert len({*etags.values(), wire.get(path).headers["etag"]}) == len(etags) + 1
    etag = etags["plain.txt"]
    unchanged = wire.get(at(path, "plain.txt"), f"If-None-Match: {etag}")
    assert (unchanged.status, unchanged.headers["etag"]) == (304, etag)
    assert wire.get(at(path, "no suffix"), f"If-None-Match: {etag}").status == 200
    assert wire.get(at(path, "no suffix"), f"If-Match: {etag}").status == 412
    assert wire.get(at(path, "plain.txt"), f"If-Range: {etag}", "Range: bytes=1-2").body == b"la"
    assert wire.get(at(path, "no suffix"), f"If-Range: {etag}", "Range: bytes=1-2").status == 200


def test_a_member_that_is_not_there_is_404_and_says_how_to_list(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    answer = wire.get(at(odd[0], "none.jpg"))
    assert (answer.status, answer.code) == (404, "member_not_found")
    assert "'none.jpg'" in answer.message
    assert f"/api/members?object=ais://pool/odd.tar lists its {len(odd[1])}" in answer.message
    assert wire.ask("HEAD", at(odd[0], "none.jpg")).status == 404
    assert wire.get(at("/o/ais/pool/none.tar", "a")).code == "object_not_found"
    assert wire.get(at("/o/ais/nowhere/none.tar", "a")).code == "bucket_not_found"


@pytest.mark.parametrize(
    "query",
    ["?member=", "?member=a&member=b", "?members=a", "?member=%ff", "?member=plain.txt&x=1", "?archpath=plain.txt"],
)
def test_a_query_that_is_not_understood_is_refused(wire: Wire, odd: tuple[str, dict[str, bytes]], query: str) -> None:
    answer = wire.get(odd[0] + query)
    assert (answer.status, answer.code) == (400, "bad_request")


def test_a_member_is_neither_written_nor_removed_alone(wire: Wire, odd: tuple[str, dict[str, bytes]]) -> None:
    assert wire.put(at(odd[0], "plain.txt"), b"x").status == 400
    assert wire.delete(at(odd[0], "plain.txt")).status == 400
    assert wire.get(at(odd[0], "plain.txt")).body == b"plain"


def test_of_equal_names_the_last_is_read_as_tar_extracts_it(wire: Wire) -> None:
    wire.put("/o/ais/pool/twice.tar", member(b"a.txt", b"first") + member(b"b.txt") + member(b"a.txt", b"second") + END)
    assert wire.get(at("/o/ais/pool/twice.tar", "a.txt")).body == b"second"
    page = wire.get("/api/members?object=ais://pool/twice.tar").json()
    assert [found["name"] for found in page["members"]] == ["a.txt", "b.txt", "a.txt"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"", "empty"), (b"no tar " * 1000, "not a tar"), (archive({"a": b"1" * 2000})[:1500], "truncated")],
)
def test_what_is_no_good_tar_is_422(wire: Wire, body: bytes, said: str) -> None:
    wire.put("/o/ais/pool/bad.tar", body)
    for path in (at("/o/ais/pool/bad.tar", "a"), "/api/members?object=ais://pool/bad.tar"):
        for _ in range(2):
            answer = wire.get(path)
            assert (answer.status, answer.code) == (422, "bad_shard")
            assert said in answer.message
            assert "ais://pool/bad.tar" in answer.message
    assert not index_file(wire, "ais://pool/bad.tar").exists()
    wire.put("/o/ais/pool/bad.tar", archive({"a": b"good"}))
    assert wire.get(at("/o/ais/pool/bad.tar", "a")).body == b"good"


def test_pages_of_members_are_in_the_shards_order(wire: Wire, shards: Path) -> None:
    uri = f"gs://sharded-imagenet/{SHARD}"
    with tarfile.open(shards / SHARD) as judge:
        expected = [(info.name, info.offset_data, info.size) for info in judge if info.isreg()]
    listed: list[tuple[str, int, int]] = []
    after: str | None = "0"
    while after is not None:
        page = json.loads(wire.get(f"/api/members?object={uri}&after={after}&limit=7").body)
        assert page["total"] == len(expected)
        assert f'"{page["etag"]}"' == wire.get(TRAIN).headers["etag"]
        listed += [(found["name"], found["offset"], found["size"]) for found in page["members"]]
        after = page["next"]
    assert listed == expected
    assert wire.get(f"/api/members?object={uri}&after=99999999").json()["members"] == []
    for query in ("", "?object=x", f"?object={uri}&after=-1", f"?object={uri}&limit=x", f"?object={uri}&prefix=a"):
        assert wire.get(f"/api/members{query}").status == 400, query


def test_a_name_that_is_no_utf8_does_not_stop_the_listing(wire: Wire) -> None:
    wire.put("/o/ais/pool/latin.tar", member(b"caf\xe9.txt", b"x") + member(b"b.txt", b"y") + END)
    page = json.loads(wire.get("/api/members?object=ais://pool/latin.tar").body)
    assert [found["name"] for found in page["members"]] == ["caf�.txt", "b.txt"]
    assert wire.get(at("/o/ais/pool/latin.tar", "b.txt")).body == b"y"


def test_a_replaced_shard_has_other_members_at_once(wire: Wire) -> None:
    path = "/o/ais/pool/replaced.tar"
    for version in range(5):
        wire.put(path, archive({f"pad{version}": b"p" * 700 * version, "same.txt": b"%d" % version}))
        assert wire.get(at(path, "same.txt")).body == b"%d" % version
        assert wire.get(at(path, f"pad{version - 1}")).code == "member_not_found"
    assert wire.delete(path).status == 204
    assert index_file(wire, "ais://pool/replaced.tar").exists()
    assert wire.get(at(path, "same.txt")).code == "object_not_found"
    assert not index_file(wire, "ais://pool/replaced.tar").exists()


def test_a_file_that_was_changed_has_other_members_at_once(wire: Wire, notes: Path) -> None:
    for version in range(5):
        (notes / "edited.tar").write_bytes(archive({"x" * version + "a": b"", "b": b"%d" % version * (version + 1)}))
        answer = wire.get(at("/o/ais/notes/edited.tar", "b"))
        assert (answer.status, answer.body) == (200, b"%d" % version * (version + 1))


def test_a_file_that_changes_under_the_reader_of_a_member_is_never_completed(wire: Wire, notes: Path) -> None:
    (notes / "changing.tar").write_bytes(archive({"large": bytes(20 * MIB)}))
    with wire.connect(receive_buffer=16 << 10) as peer:
        peer.send(request("GET", at("/o/ais/notes/changing.tar", "large")))
        first = peer.read_some()
        with open(notes / "changing.tar", "r+b") as stream:
            stream.seek(10 * MIB)
            stream.write(b"changed")
        peer.unread(first)
        with pytest.raises(Unfinished):
            peer.read()
    (notes / "changing.tar").unlink()


def test_readers_and_writers_of_one_shard_never_see_a_mix(wire: Wire) -> None:
    """Each version's members hold its number and lie elsewhere."""
    path = "/o/ais/pool/mixed.tar"

    def shard(version: int) -> bytes:
        members = {f"{number}.txt": b"%d:%d" % (version, number) for number in range(200)}
        names = sorted(members, key=lambda name: hashlib.sha256(f"{version}{name}".encode()).digest())
        return archive({name: members[name] for name in names})

    wire.put(path, shard(0))

    def read(seed: int) -> list[int]:
        choose, seen = random.Random(seed), []
        for _ in range(60):
            number = choose.randrange(200)
            answer = wire.get(at(path, f"{number}.txt"))
            assert answer.status == 200
            version, found = map(int, answer.body.split(b":"))
            assert found == number
            seen.append(version)
        return seen

    def write() -> None:
        for version in range(1, 30):
            assert wire.put(path, shard(version)).status == 200

    with ThreadPoolExecutor(5) as threads:
        writer = threads.submit(write)
        for seen in threads.map(read, range(4)):
            assert seen == sorted(seen)
        writer.result()
    assert wire.get(at(path, "7.txt")).body == b"29:7"


def test_a_corrupt_index_is_made_again(wire: Wire, shards: Path, tmp_path: Path) -> None:
    from shardmill.testing.node import running_node

    data = tmp_path / "data"
    with tarfile.open(shards / SHARD) as judge:
        info = list(judge)[-1]
        file = judge.extractfile(info)
        assert file is not None
        expected = file.read()
    flags = ("--bucket", f"gs://sharded-imagenet=dir:{shards}", "--workers", "1")
    with running_node(*flags, data=data) as node:
        assert Wire(node, ()).get(at(TRAIN, info.name)).body == expected
    (path,) = (data / "members").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    with running_node(*flags, data=data) as node:
        assert Wire(node, ()).get(at(TRAIN, info.name)).body == expected
        assert path.read_bytes() == whole


def test_readers_who_leave_while_a_shard_is_indexed_leave_nothing(wire: Wire, notes: Path) -> None:
    """Large enough that headers are read for a while."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(60_000):
            tar.addfile(tarfile.TarInfo(f"{number}.cls"))
    (notes / "many.tar").write_bytes(stream.getvalue())
    path, name = "/o/ais/notes/many.tar", str(notes / "many.tar")
    before = [target for target in wire.descriptors().values() if target == name]
    for _ in range(3):
        with wire.connect() as peer:
            peer.send(request("GET", at(path, "59999.cls")))
            wait_for(lambda: name in wire.descriptors().values(), "the shard is open")
            peer.reset()
    wait_for(lambda: [target for target in wire.descriptors().values() if target == name] == before, "it is closed")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: wire.get(at(path, f"{number}.cls")).status, range(0, 60_000, 7500)))
    assert answers == [200] * 8
    (notes / "many.tar").unlink()
