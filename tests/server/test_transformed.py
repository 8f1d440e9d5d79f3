"""`/t` byte by byte: URLs, headers, what is a run's and what a finished result's, and how each failure looks."""

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from shardmill.core.paths import folder_key
from shardmill.core.refs import ObjectRef
from shardmill.testing.node import running_node
from tests.etl.judges import gnu_tar_is_content, tarfile_is_content
from tests.etl.support import members, request_for, write_shard
from tests.server.wire import Answer, Unfinished, Wire, request, wait_for

SHARD = "imagenet-train-000000.tar"
OTHER = "imagenet-train-000001.tar"
IMAGENET = "/t/gs/sharded-imagenet"

ROLL = """
import random

def transform(sample):
    return {"__key__": sample["__key__"], "txt": str(random.randrange(10**9)), "cls": sample["cls"]}
"""
RAISE = """
def transform(sample):
    raise ValueError("not " + "today")
"""
RAISE_LATE = """
def transform(sample):
    if int(sample["__key__"]) % 32 == 20:
        raise ValueError("late in " + sample["__key__"])
    sample["blob"] = bytes(100_000)
    return sample
"""
LARGE = """
def transform(sample):
    return {"__key__": sample["__key__"], "blob": bytes(200_000), "cls": "12"}
"""
DROP = "def transform(sample):\n    return None\n"


@pytest.fixture(scope="session")
def roll(wire: Wire) -> str:
    """A version that draws a number for each sample."""
    return wire.register(ROLL, "roll")


def path_of(spec: str, file: str = SHARD) -> str:
    return f"{IMAGENET}/{spec}~{file}"


def runs_begun(wire: Wire) -> float:
    return sum(value for name, value in wire.metrics().items() if name.startswith("shardmill_runs{"))


def finished(wire: Wire, path: str) -> Answer:
    """The answer once there is a finished result."""
    answers: list[Answer] = []

    def ask() -> bool:
        answers.append(wire.get(path))
        return "etag" in answers[-1].headers

    wait_for(ask, f"{path} is finished")
    return answers[-1]


def test_an_answer_without_a_seed_is_fresh_and_says_what_made_it(wire: Wire, roll: str) -> None:
    first, second = wire.get(path_of(roll)), wire.get(path_of(roll))
    assert members(first.body) != members(second.body)
    for answer in (first, second):
        assert answer.status == 200
        assert answer.headers["shardmill-transform"] == roll
        assert re.fullmatch(r"run-[0-9]+", answer.headers["shardmill-run"])
        assert 0 <= int(answer.headers["shardmill-seed"]) < 2**63
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["shardmill-request-id"])
        assert answer.headers["content-type"] == "application/x-tar"
        assert answer.headers["accept-ranges"] == "none"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "sandbox"
        assert not {"etag", "content-length", "content-location", "last-modified"} & set(answer.headers)
    seeded = wire.get(path_of(f"{roll},seed={first.headers['shardmill-seed']}"))
    assert seeded.body == first.body
    assert seeded.headers["cache-control"] == "no-cache"


def test_a_bare_name_is_the_newest_version_and_tells_its_whole_url(wire: Wire, roll: str) -> None:
    bare = wire.get(path_of("roll,seed=7"))
    assert bare.headers["content-location"] == path_of(f"{roll},seed=7")
    assert bare.headers["cache-control"] == "no-cache"
    assert wire.get(bare.headers["content-location"]).body == bare.body
    newer = wire.register(ROLL.replace("10**9", "10**8"), "roll")
    try:
        assert wire.ask("HEAD", path_of("roll")).headers["shardmill-transform"] == newer
        assert wire.get(path_of(f"{roll},seed=7")).body == bare.body
    finally:
        wire.register(ROLL, "roll")
    assert wire.ask("HEAD", path_of("roll")).headers["shardmill-transform"] == roll
    assert "content-location" not in wire.get(path_of(roll)).headers
    dirs = wire.ask("HEAD", "/t/ais/pool/a%20b/c/roll~x.tar")
    assert dirs.status == 404


def test_head_starts_no_run(wire: Wire) -> None:
    uuid = wire.register(RAISE, "raise-for-head")
    before = runs_begun(wire)
    for spec, cache in ((uuid, "no-store"), (f"{uuid},seed=1", "no-cache"), ("raise-for-head", "no-store")):
        answer = wire.ask("HEAD", path_of(spec))
        assert answer.status == 200
        assert answer.headers["shardmill-transform"] == uuid
        assert answer.headers["cache-control"] == cache
        assert not {"shardmill-run", "etag"} & set(answer.headers)
    assert wire.ask("HEAD", path_of(f"{uuid},seed=1")).headers["shardmill-seed"] == "1"
    assert runs_begun(wire) == before


def test_a_seeded_url_becomes_an_object_like_any_other(wire: Wire, roll: str) -> None:
    path = path_of(f"{roll},seed=11")
    streamed = wire.get(path)
    whole = finished(wire, path)
    assert whole.body == streamed.body
    assert int(whole.headers["content-length"]) == len(whole.body)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["cache-control"] == "no-cache"
    assert whole.headers["shardmill-seed"] == "11"
    assert whole.headers["shardmill-checksum"] == f"xxh3:{whole.headers['etag'][1:-1]}"
    head = wire.ask("HEAD", path)
    assert head.headers["etag"] == whole.headers["etag"]
    assert head.headers["content-length"] == whole.headers["content-length"]
    part = wire.get(path, "Range: bytes=100-999")
    assert (part.status, part.body) == (206, whole.body[100:1000])
    assert wire.get(path, f"Range: bytes={len(whole.body)}-").status == 416
    assert wire.get(path, f"If-None-Match: {whole.headers['etag']}").status == 304
    assert wire.get(path, 'If-Match: "x"').code == "precondition_failed"


def test_40_a_range_of_what_is_not_there_yet_waits_and_is_never_of_the_source(
    wire: Wire, roll: str, shards: Path
) -> None:
    part = wire.get(path_of(f"{roll},seed=12"), "Range: bytes=0-511")
    assert (part.status, len(part.body)) == (206, 512)
    whole = finished(wire, path_of(f"{roll},seed=12"))
    assert part.body == whole.body[:512]
    fresh = wire.get(path_of(roll), "Range: bytes=0-511")
    assert (fresh.status, fresh.headers["accept-ranges"]) == (200, "none")
    assert len(members(fresh.body)) == len(members(whole.body))


def test_a_result_follows_its_source(wire: Wire, roll: str, tmp_path: Path) -> None:
    for samples in (3, 5):
        shard = write_shard(tmp_path / "a.tar", [{"cls": b"%d" % number} for number in range(samples)])
        wire.put("/o/ais/pool/following/a.tar", shard.read_bytes())
        for _ in range(2):
            assert len(members(wire.get(f"/t/ais/pool/following/{roll},seed=1~a.tar").body)) == 2 * samples
    wire.delete("/o/ais/pool/following/a.tar")
    assert wire.get(f"/t/ais/pool/following/{roll},seed=1~a.tar").code == "object_not_found"


def test_start_and_count_take_samples_as_they_would_be(wire: Wire, roll: str) -> None:
    whole = list(members(wire.get(path_of(f"{roll},seed=3")).body).items())
    part = list(members(wire.get(path_of(f"{roll},seed=3,start=4,count=3")).body).items())
    assert part == whole[8:14]
    beyond = wire.get(path_of(f"{roll},seed=3,start=100000"))
    assert (beyond.status, beyond.code) == (422, "sample_out_of_range")
    tail = members(wire.get(path_of(f"{roll},seed=3,start=30,count=100000")).body)
    assert list(tail.items()) == whole[60:]


def test_a_shard_of_which_nothing_is_left_is_a_valid_empty_tar(wire: Wire) -> None:
    answer = wire.get(path_of(f"{wire.register(DROP, 'drop')},seed=1"))
    assert answer.status == 200
    assert members(answer.body) == {}
    assert len(answer.body) >= 1024
    listing = subprocess.run(["tar", "-tf", "-"], input=answer.body, capture_output=True, check=True)
    assert (listing.stdout, listing.stderr) == (b"", b"")


def test_what_fails_before_the_first_byte_is_422_with_the_users_own_traceback(wire: Wire) -> None:
    """422 is what stock loaders do not try again."""
    uuid = wire.register(RAISE, "raise")
    for spec in (uuid, f"{uuid},seed=1", f"{uuid},seed=1", f"{uuid},errors=skip:0.5"):
        answer = wire.get(path_of(spec))
        assert (answer.status, answer.code) == (422, "transform_failed")
        assert "not today" in answer.message
        story = str(answer.json()["traceback"])
        assert '/home/user/transform.py", line 3, in transform' in story
        assert 'raise ValueError("not " + "today")' in story


def test_what_fails_later_is_cut_and_explained_by_its_request(wire: Wire) -> None:
    uuid = wire.register(RAISE_LATE, "raise-late")
    with wire.connect() as peer:
        peer.send(request("GET", path_of(uuid)))
        status, headers = peer.read_head()
        assert status == 200
        with pytest.raises(Unfinished) as cut:
            peer.read_chunks(status)
    assert cut.value.got
    assert not tarfile_is_content(cut.value.got)
    assert not gnu_tar_is_content(cut.value.got)
    request_id = headers["shardmill-request-id"]
    found = wire.get(f"/api/transforms/errors?request={request_id}").json()
    assert isinstance(found["failures"], list)
    failure = found["failures"][0]
    assert failure["request"] == request_id
    assert failure["transform"] == uuid
    assert (failure["bucket"], failure["object"]) == ("gs://sharded-imagenet", SHARD)
    assert int(failure["sample"]) % 32 == 20
    assert "late in" in failure["message"]
    assert "transform.py" in failure["traceback"]
    assert str(failure["seed"]) == headers["shardmill-seed"]


def test_a_sample_with_a_large_payload_is_one_chunk(wire: Wire) -> None:
    """Each chunk is a call to the kernel, with a look for room before it."""
    uuid = wire.register(LARGE, "large")
    chunks: list[int] = []
    with wire.connect() as peer:
        peer.send(request("GET", path_of(f"{uuid},seed=1,count=24")))
        status, _ = peer.read_head()
        body = peer.read_chunks(status, chunks)
    assert len(members(body)) == 48
    # Readers that fall behind are sent slices of the file, of 1 MiB.
    assert len(chunks) < 1.5 * 24


def test_everything_before_the_sample_that_fails_is_sent(wire: Wire) -> None:
    whole = wire.get(path_of(f"{wire.register(LARGE, 'large')},seed=1")).body
    names = list(members(whole))
    key = names[2 * 20].partition(".")[0]
    fails = LARGE.replace("    return", f"    if sample['__key__'] == {key!r}: raise ValueError('no')\n    return")
    with wire.connect() as peer:
        peer.send(request("GET", path_of(f"{wire.register(fails, 'large-fails')},seed=1")))
        status, _ = peer.read_head()
        with pytest.raises(Unfinished) as cut:
            peer.read_chunks(status)
    # Headers, 391 blocks, one block; of the last payload all but its last byte, which would look like an end.
    assert cut.value.got == whole[: 20 * 512 * (1 + 391 + 1 + 1) - 511]


@pytest.mark.parametrize(
    ("name", "data"),
    [("text", b"hello world, this is no tar" * 100), ("html", b"<html><body>404</body></html>"), ("gzip", b"\x1f\x8b\x08" + bytes(600)),
     ("empty", b""), ("short", b"x" * 100)],
)  # fmt: skip
def test_an_object_that_is_no_tar_is_422_transformed_and_200_as_it_is(
    wire: Wire, roll: str, name: str, data: bytes
) -> None:
    wire.put(f"/o/ais/pool/bad/{name}.tar", data)
    answer = wire.get(f"/t/ais/pool/bad/{roll}~{name}.tar")
    assert (answer.status, answer.code) == (422, "bad_shard")
    assert wire.get(f"/o/ais/pool/bad/{name}.tar").body == data


def test_errors_can_be_asked_for_by_version_object_and_sample(wire: Wire) -> None:
    uuid = wire.register(RAISE_LATE, "raise-late")
    with wire.connect() as peer:
        peer.send(request("GET", path_of(f"{uuid},errors=skip:1", OTHER)))
        assert peer.read().status == 200
    everything = wire.get("/api/transforms/errors?transform=raise-late").json()
    one = wire.get(f"/api/transforms/errors?transform={uuid}&bucket=gs://sharded-imagenet&key={OTHER}").json()
    assert isinstance(everything["failures"], list)
    assert isinstance(one["failures"], list)
    assert {failure["object"] for failure in one["failures"]} == {OTHER}
    assert everything["total"] >= len(everything["failures"]) >= len(one["failures"]) >= 1  # type: ignore[operator]
    sample = one["failures"][0]["sample"]
    by_sample = wire.get(f"/api/transforms/errors?key={sample}").json()
    assert isinstance(by_sample["failures"], list)
    assert {failure["sample"] for failure in by_sample["failures"]} == {sample}
    assert wire.get("/api/transforms/errors?request=unknown").json()["failures"] == []
    assert wire.get("/api/transforms/errors?bucket=nonsense").status == 400


D = "0123456789ab"

NOT_CANONICAL = {
    f"t@{D},seed=01": f"t@{D},seed=1",
    f"t@{D},seed=1,epoch=0": f"t@{D},seed=1",
    f"t@{D},epoch=1,seed=2": f"t@{D},seed=2,epoch=1",
    f"t@{D},errors=fail": f"t@{D}",
    f"t@{D},errors=skip:0.10": f"t@{D},errors=skip:0.1",
    f"t@{D},errors=skip:1.0": f"t@{D},errors=skip:1",
    f"t@{D},start=0": f"t@{D}",
    f"t@{D},count=5,start=2": f"t@{D},start=2,count=5",
    f"t@{D.upper()}": f"t@{D}",
    f"t%40{D}": f"t@{D}",
    f"t@{D}%2Cseed=1": f"t@{D},seed=1",
    f"%74@{D}": f"t@{D}",
}


@pytest.mark.parametrize("spec", NOT_CANONICAL)
def test_a_spec_in_another_spelling_is_400_and_names_the_right_one(wire: Wire, spec: str) -> None:
    answer = wire.get(path_of(spec))
    assert (answer.status, answer.code) == (400, "bad_request")
    assert f"'{NOT_CANONICAL[spec]}'" in answer.message


@pytest.mark.parametrize(
    "spec",
    [
        "", "@", f"@{D}", "t@", "t@123", f"t@{D}x", f"t@{D}0" * 6, f"T@{D}", f"-t@{D}", f"{'t' * 64}@{D}", f"t@{'0' * 65}",
        f"t@{D},", f"t@{D},,seed=1", f"t@{D},seed", f"t@{D},seed=", f"t@{D},seed=-1", f"t@{D},seed=+1", f"t@{D},seed=1.5",
        f"t@{D},seed=9223372036854775808", f"t@{D},seed={'9' * 100}", f"t@{D},seed=x", f"t@{D},seed=1,seed=1",
        f"t@{D},epoch=1", f"t@{D},errors=skip", f"t@{D},errors=skip:0", f"t@{D},errors=skip:1.5", f"t@{D},errors=skip:-1",
        f"t@{D},errors=skip:nan", f"t@{D},errors=ignore", f"t@{D},start=-1", f"t@{D},count=0", f"t@{D},args=x",
        f"t@{D},k=xyz", f"t@{D},k=123", f"t@{D},size=3", f"t@{D};seed=1", f"t@{D}?", "t,args=0123456789ab",
    ],
)  # fmt: skip
def test_a_spec_that_is_none_is_400(wire: Wire, spec: str) -> None:
    answer = wire.get(path_of(spec))
    assert (answer.status, answer.code) == (400, "bad_request")


@pytest.mark.parametrize("path", ["/t/gs/sharded-imagenet/nothing.tar", "/t/gs/sharded-imagenet/roll~", "/t/gs/roll~x", "/t/", "/t/gs",
                                  "/t/gs/sharded-imagenet/roll%7Ex.tar", "/t/gs/sharded-imagenet/dir~x/file.tar"])  # fmt: skip
def test_a_path_without_spec_and_file_is_400(wire: Wire, path: str) -> None:
    assert wire.get(path).status == 400


def test_the_last_segment_has_at_most_243_bytes(wire: Wire, roll: str) -> None:
    room = 243 - len(f"{roll}~.tar")
    assert wire.get(path_of(roll, "x" * room + ".tar")).status == 404
    answer = wire.get(path_of(roll, "x" * (room + 1) + ".tar"))
    assert (answer.status, answer.code) == (400, "bad_request")
    assert "243" in answer.message
    assert wire.get(path_of(roll, "%20" * (room // 3 + 2) + ".tar")).status == 400


def test_k_belongs_to_bucket_and_folders(wire: Wire, roll: str) -> None:
    right = folder_key(ObjectRef.parse(f"gs://sharded-imagenet/{SHARD}"), 8)
    for digits in range(4, 9):
        assert wire.ask("HEAD", path_of(f"{roll},k={right[:digits]}")).status == 200
    wrong = f"{int(right[:4], 16) ^ 1:04x}"
    answer = wire.get(path_of(f"{roll},k={wrong}"))
    assert (answer.status, answer.code) == (400, "bad_request")
    assert right[:4] in answer.message
    assert wire.get(f"/t/ais/pool/{roll},k={right[:4]}~{SHARD}").status == 400


def test_27_an_alias_in_the_path_is_400_with_the_canonical_provider(wire: Wire, roll: str) -> None:
    answer = wire.get(f"/t/gcs/sharded-imagenet/{roll}~{SHARD}")
    assert (answer.status, answer.code) == (400, "bad_request")
    assert "'gs'" in answer.message


def test_what_is_named_and_not_there_is_404_by_its_kind(wire: Wire, roll: str) -> None:
    for path, code in (
        (path_of(f"nobody@{D}"), "transform_not_found"),
        (path_of("nobody"), "transform_not_found"),
        (path_of(f"roll@{D}"), "transform_not_found"),
        (path_of(f"{roll},args=0123456789ab"), "transform_not_found"),
        (path_of(roll, "nothing.tar"), "object_not_found"),
        (f"/t/gs/nowhere/{roll}~x.tar", "bucket_not_found"),
    ):
        for method in ("GET", "HEAD"):
            answer = wire.ask(method, path)
            assert answer.status == 404
        assert wire.get(path).code == code


def test_more_digits_than_twelve_name_the_same_version(wire: Wire, roll: str) -> None:
    details = wire.get("/api/transforms/roll").json()["transform"]
    assert isinstance(details, dict)
    full = details["digest"]
    assert len(full) == 64
    for digits in (12, 13, 63, 64):
        answer = wire.get(path_of(f"roll@{full[:digits]},seed=5"))
        assert (answer.status, answer.headers["shardmill-transform"]) == (200, roll)


def test_digits_that_fit_several_versions_are_409(tmp_path: Path, shards: Path) -> None:
    """Two digests with twelve digits in common, as chance would have them in 2^24 versions; here by a second record."""
    data = tmp_path / "data"
    buckets = ("--bucket", f"gs://sharded-imagenet=dir:{shards}")
    with running_node(*buckets, data=data) as node:
        uuid = Wire(node, ()).register(ROLL, "twins")
        digest = str(Wire(node, ()).get("/api/transforms/twins").json()["transform"]["digest"])  # type: ignore[index]
    twin = digest[:20] + "".join("f" if digit == "0" else "0" for digit in digest[20:])
    for file in list((data / "transforms" / "versions").rglob("*")):
        if file.is_file():
            text = file.read_bytes().replace(digest.encode(), twin.encode())
            file.with_name(file.name.replace(digest, twin)).write_bytes(text)
    with running_node(*buckets, data=data) as node:
        wire = Wire(node, ())
        for path in (path_of(f"{uuid},seed=1"), path_of(f"twins@{digest[:20]}"), f"/api/transforms/{uuid}"):
            answer = wire.get(path)
            assert (answer.status, answer.code) == (409, "conflict")
            assert "more digits" in answer.message
        one = wire.get(path_of(f"twins@{digest[:21]},seed=1"))
        other = wire.get(path_of(f"twins@{twin[:21]},seed=1"))
        assert (one.status, other.status) == (200, 200)
        assert wire.get(path_of("twins")).status == 200


def test_http_1_0_gets_what_has_a_length_and_no_chunks(wire: Wire, roll: str) -> None:
    path = path_of(f"{roll},seed=21")
    old = f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
    fresh = wire.tell(f"GET {path_of(roll)} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    assert (fresh.status, fresh.code) == (400, "bad_request")
    whole = finished(wire, path)
    assert wire.tell(old).body == whole.body


def test_only_get_and_head_transform(wire: Wire, roll: str) -> None:
    for method in ("PUT", "DELETE", "POST"):
        answer = wire.ask(method, path_of(roll), body=b"x")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_removed_version_is_gone_from_its_urls(wire: Wire) -> None:
    uuid = wire.register(DROP.replace("None", "sample"), "removed")
    assert wire.get(path_of(f"{uuid},seed=1")).status == 200
    assert wire.delete(f"/api/transforms/{uuid}").status == 204
    assert wire.get(path_of(f"{uuid},seed=1")).code == "transform_not_found"
    assert wire.delete(f"/api/transforms/{uuid}").code == "transform_not_found"


def test_arguments_decide_the_version_that_a_url_names(wire: Wire) -> None:
    source = 'def transform(sample, *, word):\n    return {"__key__": sample["__key__"], "txt": word}\n'
    found = {}
    for word in ("one", "two"):
        wanted = msgspec.structs.replace(request_for(source, name="said", decoder=None), args={"word": word})
        uuid = str(wire.post_json("/api/transforms", wanted).json()["uuid"])
        assert re.fullmatch(r"said@[0-9a-f]{12},args=[0-9a-f]{12}", uuid)
        found[uuid] = word
    assert len(found) == 2
    for uuid, word in found.items():
        assert set(members(wire.get(path_of(f"{uuid.replace(',args', ',count=2,args')}")).body).values()) == {
            word.encode()
        }
