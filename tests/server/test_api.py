"""`/api`: every route, what it answers and what it refuses."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shardmill import __version__
from shardmill.core.api import BucketInfo, Buckets, ConfigInfo, ObjectPage, TransformDetails, TransformInfo, Transforms
from tests.etl.support import request_for
from tests.server.wire import Wire, in_chunks, request, wait_for

IDENTITY = "def transform(sample):\n    return sample\n"
SHARD = "imagenet-train-000000.tar"
LINES = "Accept: application/x-ndjson"


def registration(source: str = IDENTITY, name: str = "any", **changes: Any) -> dict[str, Any]:
    """A registration as JSON, with fields of its own put in place."""
    document = json.loads(msgspec.json.encode(request_for(source, name=name, decoder=None)))
    code = changes.pop("code", {})
    document["code"] = {**document["code"], **code}
    return {**document, **changes}


# Buckets


def test_a_bucket_is_made_listed_and_removed(wire: Wire) -> None:
    path = "/api/buckets/ais/made.here-1"
    assert wire.ask("PUT", path).status == 201
    again = wire.ask("PUT", path)
    assert (again.status, again.code) == (409, "conflict")
    listed = msgspec.json.decode(wire.get("/api/buckets").body, type=Buckets).buckets
    assert BucketInfo("ais://made.here-1", "pool", True) in listed
    assert [info.uri for info in listed] == sorted(info.uri for info in listed)
    wire.put("/o/ais/made.here-1/a", b"x")
    full = wire.delete(path)
    assert (full.status, full.code) == (409, "conflict")
    assert wire.delete(f"{path}?force=false").status == 409
    assert wire.delete(f"{path}?force=true").status == 204
    assert wire.get("/o/ais/made.here-1/a").code == "bucket_not_found"
    assert wire.delete(path).code == "bucket_not_found"


def test_the_listing_tells_kind_and_access_but_no_path(wire: Wire) -> None:
    answer = wire.get("/api/buckets")
    known = {info.uri: info for info in msgspec.json.decode(answer.body, type=Buckets).buckets}
    assert known["gs://sharded-imagenet"] == BucketInfo("gs://sharded-imagenet", "dir", False)
    assert known["ais://notes"] == BucketInfo("ais://notes", "dir", True)
    assert known["ais://pool"] == BucketInfo("ais://pool", "pool", True)
    assert not any(text in answer.body.decode() for text in wire.hidden)


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("PUT", "gs/new", 400, "--bucket gs://new"),
        ("PUT", "s3/new", 400, "--bucket s3://new"),
        ("PUT", "http/new", 400, "--bucket ht://new"),
        ("PUT", "gcs/new", 400, "'gs'"),
        ("PUT", "nope/new", 400, "unknown provider"),
        ("PUT", "ais", 400, "/api/buckets/provider/bucket"),
        ("PUT", "ais/", 400, "bad bucket name"),
        ("PUT", "ais/new/more", 400, "/api/buckets/provider/bucket"),
        ("PUT", "ais/new/", 400, "/api/buckets/provider/bucket"),
        ("DELETE", "ais/pool", 409, "configured"),
        ("DELETE", "gs/sharded-imagenet?force=true", 409, "configured"),
        ("DELETE", "ais/never-made", 404, "shardmill mb ais://never-made"),
        ("DELETE", "ais/pool?force=maybe", 400, "neither true nor false"),
        ("DELETE", "ais/pool?force=", 400, "neither true nor false"),
    ],
)
def test_a_bucket_that_cannot_be_made_or_removed_says_why(
    wire: Wire, method: str, path: str, status: int, said: str
) -> None:
    answer = wire.ask(method, f"/api/buckets/{path}")
    assert answer.status == status
    assert said in answer.message


# Listings


@pytest.fixture(scope="module")
def listed(wire: Wire) -> Iterator[list[str]]:
    """Keys of `ais://listed`, in their order."""
    wire.ask("PUT", "/api/buckets/ais/listed")
    keys = [f"train/{number:03d}.tar" for number in range(25)] + ["train", "train.json", "val/0", "val/1/2", "é", "🙂"]
    for key in keys:
        wire.put(f"/o/ais/listed/{_quoted(key)}", key.encode())
    yield sorted(keys, key=str.encode)
    wire.delete("/api/buckets/ais/listed?force=true")


def _quoted(key: str) -> str:
    return "".join(f"%{byte:02X}" if byte > 127 else chr(byte) for byte in key.encode())


def page(wire: Wire, **parameters: str | int) -> ObjectPage:
    query = "&".join(f"{name}={_quoted(str(value))}" for name, value in parameters.items())
    answer = wire.get(f"/api/objects?bucket=ais://listed{'&' if query else ''}{query}")
    assert answer.status == 200
    return msgspec.json.decode(answer.body, type=ObjectPage)


@pytest.mark.parametrize("limit", [1, 7, 31, 1000])
@pytest.mark.parametrize("delimiter", ["", "/"])
def test_pages_hold_every_key_once_and_in_order(wire: Wire, listed: list[str], limit: int, delimiter: str) -> None:
    found: list[str] = []
    after = ""
    for _ in range(len(listed) + 1):
        one = page(wire, limit=limit, after=after, delimiter=delimiter)
        assert len(one.objects) + len(one.prefixes) <= limit
        found += [*(item.key for item in one.objects), *one.prefixes]
        if one.next is None:
            break
        after = one.next
    rolled = listed if not delimiter else ["train", "train.json", "train/", "val/", "é", "🙂"]
    assert sorted(found, key=str.encode) == sorted(rolled, key=str.encode)


def test_an_entry_tells_what_a_head_does(wire: Wire, listed: list[str]) -> None:
    (item,) = page(wire, prefix="val/0").objects
    known = wire.ask("HEAD", "/o/ais/listed/val/0").headers
    assert (item.size, f'"{item.etag}"', item.checksum) == (5, known["etag"], known["shardmill-checksum"])


def test_prefix_and_after_work_together(wire: Wire, listed: list[str]) -> None:
    assert [item.key for item in page(wire, prefix="train/0", after="train/020.tar").objects] == [
        f"train/{number:03d}.tar" for number in range(21, 25)
    ]
    assert page(wire, prefix="zzz") == ObjectPage([], [], None)
    assert page(wire, limit=0) == ObjectPage([], [], None)
    assert page(wire, prefix="val/", delimiter="/").prefixes == ["val/1/"]


def test_a_listing_needs_a_bucket(wire: Wire) -> None:
    answer = wire.get("/api/objects")
    assert (answer.status, answer.code) == (400, "bad_request")
    assert "bucket" in answer.message
    for bucket in ("", "pool", "ais:pool", "ais://", "://pool", "ais://pool/key"):
        assert wire.get(f"/api/objects?bucket={bucket}").status == 400


def test_aliases_are_for_uris(wire: Wire) -> None:
    assert wire.get("/api/objects?bucket=gcp://sharded-imagenet").status == 200


# Transforms


def test_a_registration_is_201_when_new_and_200_when_known(wire: Wire) -> None:
    first = wire.post_json("/api/transforms", registration(name="known"))
    again = wire.post_json("/api/transforms", registration(name="known"))
    assert (first.status, again.status) == (201, 200)
    info = msgspec.json.decode(first.body, type=TransformInfo)
    known = msgspec.json.decode(again.body, type=TransformInfo)
    assert msgspec.structs.replace(known, created=info.created) == info
    assert (info.name, info.uuid, info.kind, info.decoder) == ("known", f"known@{info.digest[:12]}", "sample", None)
    assert known in msgspec.json.decode(wire.get("/api/transforms").body, type=Transforms).transforms
    for path in ("known", info.uuid, f"known@{info.digest}"):
        details = msgspec.json.decode(wire.get(f"/api/transforms/{path}").body, type=TransformDetails)
        assert details.transform == known
    assert wire.delete("/api/transforms/known").status == 204
    assert wire.get("/api/transforms/known").code == "transform_not_found"


def test_removing_a_name_removes_all_its_versions(wire: Wire) -> None:
    for number in range(3):
        wire.post_json("/api/transforms", registration(f"{IDENTITY}# and\nN = {number}\n", "several"))
    assert wire.delete("/api/transforms/several").status == 204
    assert "several" not in {
        info.name for info in msgspec.json.decode(wire.get("/api/transforms").body, type=Transforms).transforms
    }


@pytest.mark.parametrize(
    "path", ["", "no", "no@0123456789ab", "No", "a/b", "a%2Fb", "no@xyz", "no@", "..", "%00", "%ff"]
)
def test_a_version_that_is_not_there_is_404_and_a_name_that_is_none_400(wire: Wire, path: str) -> None:
    for method in ("GET", "DELETE"):
        answer = wire.ask(method, f"/api/transforms/{path}")
        assert answer.status == (404 if path in ("no", "no@0123456789ab") else 400)


DEEP = 100_000

BODIES = {
    "empty": b"",
    "space": b"  \n",
    "truncated": b'{"name": "a", "code": {',
    "not UTF-8": b'{"name": "\xff"}',
    "UTF-16": '{"name": "a"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"name": NaN}',
    "Infinity": b'{"name": -Infinity}',
    "doubled field": b'{"name": "a", "name": "b"}',
    "doubled inner field": b'{"name": "a", "code": {"form": "1", "form": "2"}}',
    "depth": b"[" * DEEP + b"]" * DEEP,
    "depth in a field": b'{"args": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "list": b"[]",
    "text": b'"name"',
    "null": b"null",
    "number of 400 digits": b'{"name": ' + b"9" * 400 + b"}",
    "1e400": b'{"name": "a", "args": {"x": 1e400}}',
    "trailing junk": b"{} {}",
    "single quotes": b"{'name': 'a'}",
    "comment": b"{} // nothing",
    "control character": b'{"name": "a\nb"}',
    "lone surrogate": b'{"name": "\\ud800"}',
}


@pytest.mark.parametrize("path", ["/api/transforms", "/api/lookahead"])
@pytest.mark.parametrize("case", BODIES)
def test_51_a_body_that_is_no_registration_is_400(wire: Wire, path: str, case: str) -> None:
    answer = wire.ask("POST", path, body=BODIES[case])
    assert (answer.status, answer.code) == (400, "bad_request")
    assert len(answer.message) < 1000


def test_51_a_body_over_the_limit_is_413(wire: Wire) -> None:
    limit = (64 << 20) * 4 // 3 + (1 << 20)
    with wire.connect() as peer:
        peer.send(request("POST", "/api/transforms", f"Content-Length: {limit + 1}"))
        assert peer.read().code == "too_large"
    with wire.connect() as peer:
        peer.send(request("POST", "/api/lookahead", "Transfer-Encoding: chunked"))
        piece = in_chunks(bytes(1 << 20), end=b"")
        for _ in range(90):
            peer.send(piece)
        assert peer.read().code == "too_large"


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": None}, "name"),
    "name is a number": ({"name": 5}, "name"),
    "name goes up": ({"name": "../x"}, "bad transform name"),
    "name of 300": ({"name": "n" * 300}, "bad transform name"),
    "name in upper case": ({"name": "Name"}, "bad transform name"),
    "empty name": ({"name": ""}, "bad transform name"),
    "unknown field": ({"nmae": "x"}, "nmae"),
    "unknown field of code": ({"code": {"extra": 1}}, "extra"),
    "unknown kind": ({"kind": "wish"}, "kind"),
    "fields is text": ({"fields": "jpg"}, "fields"),
    "args is a list": ({"args": [1]}, "args"),
    "allow_pickle is text": ({"allow_pickle": "yes"}, "allow_pickle"),
    "form of 63 digits": ({"code": {"form": "0" * 63}}, "code.form"),
    "form in upper case": ({"code": {"form": "A" * 64}}, "code.form"),
    "empty payload": ({"code": {"payload": ""}}, "code.payload"),
    "payload no base64": ({"code": {"payload": "*"}}, "payload"),
    "unknown encoding": ({"code": {"encoding": "pickle"}}, "encoding"),
    "python is a word": ({"code": {"python": "three"}}, "code.python"),
    "module with dots": ({"code": {"modules": ["os.path"]}}, "code.modules"),
    "module that is a path": ({"code": {"modules": ["/etc/passwd"]}}, "code.modules"),
    "modules is text": ({"code": {"modules": "os"}}, "modules"),
    "probe is no object": ({"probe": "shard.tar"}, "provider://bucket/key"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_52_53_a_wrong_field_is_400_and_named(wire: Wire, case: str) -> None:
    changes, said = FIELDS[case]
    answer = wire.post_json("/api/transforms", registration(**changes))
    assert (answer.status, answer.code) == (400, "bad_request")
    assert said in answer.message
    assert wire.get("/api/transforms/any").status == 404


UNFIT: dict[str, tuple[dict[str, Any], int, str]] = {
    "a module that no environment has": ({"code": {"modules": ["nosuchmodule"]}}, 422, "nosuchmodule"),
    "another Python": ({"code": {"python": "2.7"}}, 422, "2.7"),
    "no such environment": ({"environment": "nowhere"}, 422, "nowhere"),
    "payload that is no pickle": (
        {"code": {"encoding": "cloudpickle", "payload": "AAAA", "form": "1" * 64}},
        422,
        "cannot be loaded",
    ),
    "probe of nothing": ({"probe": "gs://sharded-imagenet/none.tar"}, 404, "none.tar"),
    "probe in no bucket": ({"probe": "gs://none/none.tar"}, 404, "gs://none"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_fits_nowhere_is_refused_with_what_is_missing(wire: Wire, case: str) -> None:
    changes, status, said = UNFIT[case]
    answer = wire.post_json("/api/transforms", registration(**changes))
    assert answer.status == status
    assert said in answer.message
    assert wire.get("/api/transforms/any").status == 404


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def transform(sample)\n    pass\n", "SyntaxError"),
        ("raise RuntimeError('at import')\n", "at import"),
        ("import nosuchmodule\n", "nosuchmodule"),
        ("import sys\nsys.exit(3)\n", "SystemExit"),
        ("other = 1\n", "transform"),
        ("transform = 5\n", "not callable"),
    ],
)
def test_code_that_does_not_load_is_422_with_its_own_lines(wire: Wire, source: str, said: str) -> None:
    answer = wire.post_json("/api/transforms", registration(source))
    assert (answer.status, answer.code) == (422, "transform_failed")
    assert said in answer.message
    story = str(answer.json().get("traceback", ""))
    assert "transform.py" in story or "not callable" in answer.message or "defines no" in answer.message
    assert sys.prefix not in answer.body.decode()


def test_a_probe_reports_what_it_found(wire: Wire) -> None:
    probe = f"gs://sharded-imagenet/{SHARD}"
    answer = wire.post_json("/api/transforms", registration(name="probed", probe=probe))
    assert answer.status == 201
    info = msgspec.json.decode(answer.body, type=TransformInfo)
    assert info.probe is not None
    assert (info.probe.deterministic, info.probe.reproducible) == (True, True)
    bad = wire.post_json("/api/transforms", registration("def transform(sample):\n    1 / 0\n", "bad", probe=probe))
    assert (bad.status, bad.code) == (422, "transform_failed")
    assert "line 2" in str(bad.json()["traceback"])
    assert wire.get("/api/transforms/bad").status == 404


def test_progress_comes_line_by_line_and_the_version_last(wire: Wire) -> None:
    probe = f"gs://sharded-imagenet/{SHARD}"
    with wire.connect() as peer:
        body = msgspec.json.encode(registration(name="lines", probe=probe))
        peer.send(request("POST", "/api/transforms", LINES, body=body))
        answer = peer.read()
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        *progress, last = [json.loads(line) for line in answer.body.splitlines()]
        assert all(set(line) == {"progress"} for line in progress)
        assert any(SHARD in line["progress"] for line in progress)
        assert last["new"] is True
        assert msgspec.convert(last["transform"], TransformInfo).name == "lines"
        # And the connection goes on.
        peer.send(request("GET", "/healthz"))
        assert peer.read().status == 200


def test_a_failure_is_the_last_line(wire: Wire) -> None:
    source = "def transform(sample):\n    raise ValueError('in ' + 'vain')\n"
    body = msgspec.json.encode(registration(source, "vain", probe=f"gs://sharded-imagenet/{SHARD}"))
    answer = wire.ask("POST", "/api/transforms", LINES, body=body)
    assert answer.status == 200
    error = json.loads(answer.body.splitlines()[-1])["error"]
    assert (error["code"], error["request_id"]) == ("transform_failed", answer.headers["shardmill-request-id"])
    assert "in vain" in error["traceback"]
    assert not any(text in answer.body.decode() for text in (*wire.hidden, "site-packages", "/src/"))
    early = wire.ask("POST", "/api/transforms", LINES, body=b"{")
    assert (early.status, early.code) == (400, "bad_request")


def test_who_leaves_while_it_is_tried_leaves_nothing(wire: Wire) -> None:
    source = "import time\n\ndef transform(sample):\n    time.sleep(600)\n    return sample\n"
    body = msgspec.json.encode(registration(source, "endless", probe=f"gs://sharded-imagenet/{SHARD}"))
    with wire.connect() as peer:
        peer.send(request("POST", "/api/transforms", LINES, body=body))
        peer.read_head()
        assert b"progress" in peer.read_some()
    wait_for(
        lambda: not any(target.endswith(SHARD) for target in wire.descriptors().values()), "the shard is closed", 10
    )
    assert wire.get("/api/transforms/endless").status == 404


# The rest


def test_the_configuration_shows_what_is_in_effect(wire: Wire) -> None:
    config = msgspec.json.decode(wire.get("/api/config").body, type=ConfigInfo)
    assert (config.version, config.workers) == (__version__, 2)
    storage = config.settings["storage"]
    assert isinstance(storage, dict)
    assert (storage["max_object"], storage["durability"]) == (100_000_000, "kill")
    assert config.isolation["no_new_privileges"] in (True, False)
    (environment,) = [item for item in config.environments if item.name == "default"]
    assert "/" not in environment.interpreter


def test_answers_of_the_api_are_kept_by_no_cache(wire: Wire) -> None:
    for path in ("/api/buckets", "/api/objects?bucket=ais://pool", "/api/transforms", "/api/config", "/api/nothing"):
        assert wire.get(path).headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/api",
        "/api/",
        "/api/nothing",
        "/api/buckets/",
        "/apiary",
        "/o",
        "/t",
        "/v1/buckets",
        "/%61pi/buckets",
        "/api//buckets",
        "/API/buckets",
        "/api/buckets/../config",
    ],
)
def test_a_path_that_is_none_is_an_error_in_json(wire: Wire, path: str) -> None:
    answer = wire.get(path)
    assert answer.status in (404, 405)


def test_healthz_and_readyz_answer_in_words(wire: Wire) -> None:
    assert wire.get("/healthz").body == b"ok\n"
    assert wire.get("/readyz").body == b"ready\n"
