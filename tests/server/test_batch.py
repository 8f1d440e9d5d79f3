"""`POST /api/batch`: members of several shards and whole objects as one tar, whole or visibly cut."""

import io
import os
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from shardmill.core.api import BatchEntry
from shardmill.server.batch import MAX_PARTS
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.server.wire import Answer, Unfinished, Wire, request
from tests.shards.archives import tarfile_archive

MIB = 1 << 20
ODD, TWO, WHOLE = "ais://pool/batch/odd.tar", "ais://pool/batch/two.tar", "ais://notes/batch/whole.bin"
Asked = Sequence[tuple[str, Sequence[str] | None]]


@pytest.fixture(scope="module")
def stored(wire: Wire, notes: Path) -> Mapping[str, Mapping[str, bytes] | bytes]:
    """Objects with what they hold: members, or bytes of no tar."""
    choose = random.Random(5)
    odd = {
        "plain.txt": b"plain",
        "empty.cls": b"",
        "./dir/x.JPG": b"\xff\xd8",
        "Straße/日本.txt": b"other scripts",
        "long/" + "n" * 300 + ".npy": b"long name",
        "large.bin": choose.randbytes(3 * MIB + 17),
        "a whole piece": choose.randbytes(MIB),
        "blocks": choose.randbytes(1024),
    }
    two = {f"{number:04d}.txt": choose.randbytes(number * 37 % 5000) for number in range(1000)}
    for uri, members in ((ODD, odd), (TWO, two)):
        archive = tarfile_archive([(tarfile.TarInfo(name), data) for name, data in members.items()], tarfile.PAX_FORMAT)
        assert wire.put("/o/" + uri.replace("://", "/"), archive).status in (200, 201)
    (notes / "batch").mkdir(exist_ok=True)
    (notes / "batch" / "whole.bin").write_bytes(whole := choose.randbytes(2 * MIB + 5))
    return {ODD: odd, TWO: two, WHOLE: whole}


def post(asked: Asked, **options: str) -> bytes:
    entries = [BatchEntry(uri, None if names is None else list(names)) for uri, names in asked]
    body = msgspec.json.encode({"entries": entries, **options})
    return request("POST", "/api/batch", body=body)


def ask(wire: Wire, asked: Asked, **options: str) -> Answer:
    with wire.connect() as peer:
        peer.send(post(asked, **options))
        return peer.read()


def contents(answer: Answer) -> list[tuple[str, bytes]]:
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-tar")
    assert answer.headers["cache-control"] == "no-store"
    assert len(answer.body) == int(answer.headers["content-length"])
    assert len(answer.body) % tarfile.RECORDSIZE == 0
    assert gnu_tar_is_content(answer.body)
    found = []
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as archive:
        for info in archive:
            file = archive.extractfile(info)
            assert file is not None
            found.append((info.name, file.read()))
    return found


def test_members_and_objects_come_in_the_order_in_which_they_were_asked_for(
    wire: Wire, stored: Mapping[str, Mapping[str, bytes]]
) -> None:
    odd, two = stored[ODD], stored[TWO]
    names = random.Random(2).sample(sorted(two), 300)
    asked: Asked = [(TWO, names), (ODD, list(odd)), (WHOLE, None), (ODD, []), (TWO, names[:2]), (WHOLE, None)]
    expected = [(f"ais/pool/batch/two.tar/{name}", two[name]) for name in names]
    expected += [(f"ais/pool/batch/odd.tar/{name}", data) for name, data in odd.items()]
    whole = ("ais/notes/batch/whole.bin", stored[WHOLE])
    expected += [whole, *expected[:2], whole]  # type: ignore[list-item]
    assert contents(ask(wire, asked)) == expected


def test_names_may_be_those_of_the_members_so_that_the_answer_is_a_shard(
    wire: Wire, stored: Mapping[str, Mapping[str, bytes]]
) -> None:
    names = sorted(stored[TWO])[10:20]
    found = contents(ask(wire, [(TWO, names), (WHOLE, None)], naming="member"))
    assert found == [*((name, stored[TWO][name]) for name in names), ("batch/whole.bin", stored[WHOLE])]


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ([(TWO, ["0001.txt"]), (ODD, ["none"])], "member_not_found"),
        ([(TWO, ["0001.txt"]), ("ais://pool/batch/none.tar", ["a"])], "object_not_found"),
        ([("ais://pool/batch/none.tar", None)], "object_not_found"),
    ],
)
def test_what_does_not_exist_is_an_error_before_the_first_byte_or_left_out(
    wire: Wire, stored: Mapping[str, Mapping[str, bytes]], asked: Asked, code: str
) -> None:
    answer = ask(wire, asked)
    assert (answer.status, answer.code) == (404, code)
    found = contents(ask(wire, [*asked, (ODD, ["plain.txt"])], missing="skip"))
    assert [name.rpartition("/")[2] for name, _ in found] == [
        *(["0001.txt"] if len(asked) > 1 else []),
        "plain.txt",
    ]


def test_what_cannot_be_answered_at_all_is_no_gap(wire: Wire, stored: Mapping[str, Mapping[str, bytes]]) -> None:
    """A bucket that there is not, and an object that is no tar: leaving them out would hide a mistake."""
    for asked, status, code in (
        ([(TWO, ["0001.txt"]), ("ais://nowhere/a.tar", ["a"])], 404, "bucket_not_found"),
        ([(TWO, ["0001.txt"]), (WHOLE, ["a"])], 422, "bad_shard"),
    ):
        answer = ask(wire, asked, missing="skip")
        assert (answer.status, answer.code) == (status, code)


def test_a_batch_of_nothing_is_an_empty_tar(wire: Wire, stored: object) -> None:
    assert contents(ask(wire, [])) == []
    assert contents(ask(wire, [("ais://pool/none", None), (ODD, ["none"])], missing="skip")) == []
    assert contents(ask(wire, [(ODD, ["empty.cls"])])) == [("ais/pool/batch/odd.tar/empty.cls", b"")]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 400),
        (b'{"entries":[{"object":"ais://pool/a","members":[""]}]}', 400),
        (b'{"entries":[{"object":"pool/a"}]}', 400),
        (b'{"entries":[],"missing":"maybe"}', 400),
        (b'{"entries":[],"more":1}', 400),
        (b'{"entries":[{"object":"ais://pool/a","members":["a\\u0000b"]}]}', 404),
        (b'{"entries":[%b]}' % b",".join([b'{"object":"ais://pool/a"}'] * (MAX_PARTS + 1)), 413),
        (msgspec.json.encode({"entries": [{"object": ODD, "members": ["a"] * (MAX_PARTS + 1)}]}), 413),
        (b'{"entries":[%b]}' % b",".join([b'{"object":"ais://pool/a","members":[]}'] * (MAX_PARTS + 1)), 413),
    ],
)
def test_wrong_requests_are_refused(wire: Wire, stored: object, body: bytes, status: int) -> None:
    with wire.connect() as peer:
        peer.send(request("POST", "/api/batch", body=body))
        assert peer.read().status == status


def test_as_many_as_are_allowed_are_answered(wire: Wire, stored: Mapping[str, Mapping[str, bytes]]) -> None:
    names = random.Random(1).choices(sorted(stored[TWO]), k=MAX_PARTS)
    found = contents(ask(wire, [(TWO, [name]) for name in names], naming="member"))
    assert found == [(name, stored[TWO][name]) for name in names]


def test_an_object_that_is_replaced_meanwhile_cuts_the_answer_inside_a_payload(wire: Wire, notes: Path) -> None:
    """The first large object fills the sockets; a file behind it, too far for it to be held open, is replaced."""
    directory = notes / "replaced"
    directory.mkdir(exist_ok=True)
    (directory / "large.bin").write_bytes(os.urandom(24 * MIB))
    small = [directory / f"{number:03d}" for number in range(100)]
    for path in small:
        path.write_bytes(b"old")
    with wire.connect(receive_buffer=65536) as peer:
        peer.send(post([(f"ais://notes/replaced/{path.name}", None) for path in (directory / "large.bin", *small)]))
        status, headers = peer.read_head()
        assert status == 200
        (directory / "new").write_bytes(b"new")
        os.replace(directory / "new", small[90])
        with pytest.raises(Unfinished) as cut:
            peer.read_body(status, headers)
    assert 24 * MIB < len(cut.value.got) < int(headers["content-length"])
    assert not tarfile_is_content(cut.value.got)
    assert b"new" not in cut.value.got[24 * MIB + 512 :]


def test_what_is_held_open_is_read_as_it_was_found(wire: Wire, notes: Path) -> None:
    directory = notes / "held"
    directory.mkdir(exist_ok=True)
    (directory / "large.bin").write_bytes(os.urandom(24 * MIB))
    assert wire.put("/o/ais/pool/batch/held", b"old").status in (200, 201)
    with wire.connect(receive_buffer=65536) as peer:
        peer.send(post([("ais://notes/held/large.bin", None), ("ais://pool/batch/held", None)]))
        status, headers = peer.read_head()
        assert wire.put("/o/ais/pool/batch/held", b"new").status == 200
        answer = Answer(status, headers, peer.read_body(status, headers))
    assert contents(answer)[1] == ("ais/pool/batch/held", b"old")
