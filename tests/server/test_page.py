"""`/`, as a person's browser gets it."""

import html
from html.parser import HTMLParser

import msgspec
import pytest

from shardmill.core.jobs import JobDetails, JobRequest
from shardmill.testing.node import running_node
from tests.etl.support import request_for
from tests.server.wire import Wire


class Links(HTMLParser):
    """The page's links, its tags, and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.targets += [value for name, value in attrs if name == "href" and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_link_leads_somewhere_and_every_tag_is_closed(wire: Wire) -> None:
    wanted = request_for("def transform(sample, **given):\n    return sample\n", name="paged", decoder=None)
    plain = wire.post_json("/api/transforms", wanted).json()["uuid"]
    given = wire.post_json("/api/transforms", msgspec.structs.replace(wanted, args={"a": 1})).json()["uuid"]
    page = wire.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    links = Links(page.body.decode())
    assert links.open == []
    assert {f"/api/transforms/{plain}", f"/api/transforms/{given}"} <= set(links.targets)
    assert any("bucket=gs://sharded-imagenet" in target for target in links.targets)
    for target in links.targets:
        assert wire.get(target).status == 200, target


def test_nothing_that_a_user_names_becomes_markup(wire: Wire) -> None:
    wanted = request_for("def transform(sample):\n    return sample\n", name="marked-up", decoder=None)
    label = "</td><script>alert('x')</script>\"&.py:1"
    code = msgspec.structs.replace(wanted.code, label=label)
    assert wire.post_json("/api/transforms", msgspec.structs.replace(wanted, code=code)).status == 201
    page = wire.get("/")
    links = Links(page.body.decode())
    assert "script" not in links.tags
    assert html.escape(label) in page.body.decode()
    assert page.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("text", ["shardmill mb ais://NAME", "shardmill transform add FILE.py:FUNC --name NAME"])
def test_an_empty_node_says_how_to_begin(text: str) -> None:
    with running_node() as node:
        page = Wire(node, ()).get("/").body.decode()
    assert text in page
    assert "<table>" not in page


def test_a_job_is_on_the_page(wire: Wire) -> None:
    wanted = request_for("def transform(sample):\n    return sample\n", name="paged-job", decoder=None)
    uuid = wire.post_json("/api/transforms", wanted).json()["uuid"]
    asked = JobRequest(
        kind="transform",
        source="gs://sharded-imagenet",
        names=["imagenet-val-000000.tar"],
        destination="ais://pool",
        transform=f"{uuid},seed=1",
        rename="paged/{key}",
    )
    begun = wire.post_json("/api/jobs", asked)
    assert begun.status == 201
    job = begun.json()["id"]
    ended = msgspec.json.decode(wire.get(f"/api/jobs/{job}?wait=30").body, type=JobDetails).job
    assert (ended.state, ended.done) == ("done", 1)
    page = wire.get("/").body.decode()
    assert f"/api/jobs/{job}" in Links(page).targets
    assert "1 of 1" in page


@pytest.mark.parametrize("query", ["wait=-1", "wait=31", "wait=nan", "wait=soon", "wait=1&wait=1"])
def test_a_wait_that_is_none_is_refused(wire: Wire, query: str) -> None:
    assert wire.get(f"/api/jobs/{'0' * 16}?{query}").status == 400
