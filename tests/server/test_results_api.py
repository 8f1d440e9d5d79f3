"""The results that a node keeps, listed and removed: over HTTP, by the client, by the command, and in the metrics."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from shardmill import Client
from shardmill.cli.main import run
from shardmill.cli.results import age_text
from shardmill.core.api import Results
from shardmill.core.errors import BadRequest, TransformNotFound
from tests.server.readers import Reader, get, metric, wait_until
from tests.server.served import BUCKET, VAL, Sample, Served, serving

OTHER = "imagenet-val-000001.tar"


def shrink(sample: Sample, side: int) -> Sample:
    sample["jpg"] = sample["jpg"].resize((side, side))
    return sample


@pytest.fixture(scope="module")
def served(shards: Path) -> Iterator[Served]:
    with serving(shards) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """Of a node that keeps nothing yet."""
    with Client(served.node.endpoint) as client:
        client.transforms.remove_results(everything=True)
        yield client


def keep(client: Client, url: str) -> None:
    """Read it until it is kept."""
    get(url)
    wait_until(lambda: "ETag" in get(url, method="HEAD").headers, "the result is not kept")


@pytest.fixture
def kept(served: Served, client: Client) -> tuple[str, str]:
    """Two versions with arguments, and what is kept: two of `crop`, one of them scratch, and one each of `shrink`."""
    keep(client, served.url(seed=1))
    keep(client, served.url(OTHER, seed=1, epoch=2))
    uuids = [client.transforms.add(shrink, args={"side": side}).uuid for side in (16, 17)]
    for uuid in uuids:
        keep(client, client.object_url(BUCKET, OTHER, uuid, seed=3))
    return uuids[0], uuids[1]


def test_what_is_kept_can_be_listed(served: Served, client: Client, kept: tuple[str, str]) -> None:
    found = client.transforms.results()
    assert [result.object for result in found.results] == [OTHER, OTHER, OTHER, VAL]
    assert [result.transform for result in found.results] == [kept[1], kept[0], served.uuid, served.uuid]
    assert [result.scratch for result in found.results] == [False, False, True, False]
    first = found.results[-1]
    answer = get(client.object_url(first.bucket, first.object, first.spec))
    assert (first.size, f'"{first.etag}"') == (len(answer.body), answer.etag)
    assert (first.spec, first.bucket, first.environment) == (f"{served.uuid},seed=1", BUCKET, "default")
    assert first.made <= first.used <= time.time()
    assert found.total == 4
    assert found.bytes == sum(result.size for result in found.results) == found.used
    assert found.capacity == 10 << 30
    again = client.transforms.results(limit=1)
    assert [result.object for result in again.results] == [VAL], "the last used comes first"
    assert (again.total, again.bytes) == (4, found.bytes)


def test_a_list_is_of_what_was_asked_for(served: Served, client: Client, kept: tuple[str, str]) -> None:
    def count(transform: str | None = None, bucket: str | None = None, key: str | None = None) -> int:
        return client.transforms.results(transform, bucket=bucket, key=key).total

    name, digest = served.uuid.split("@")
    assert count(name) == count(f"{name}@{digest}") == count(f"{served.uuid},seed=9") == 2
    assert count("shrink") == count(kept[0].partition(",")[0]) == 2
    assert count(kept[0]) == 1
    assert count("absent") == count(f"{name}@{'0' * 12}") == 0
    assert count(bucket=BUCKET) == count(bucket="gcp://sharded-imagenet") == 4
    assert count(bucket="ais://other") == 0
    assert count(key=VAL) == 1
    assert count("shrink", bucket=BUCKET, key=OTHER) == 2
    assert count("shrink", key=VAL) == 0


def test_what_is_removed_is_made_again(served: Served, client: Client, kept: tuple[str, str]) -> None:
    size = client.transforms.results(kept[0]).bytes
    removed = client.transforms.remove_results(kept[0])
    assert (removed.removed, removed.bytes) == (1, size)
    assert client.transforms.remove_results(kept[0]).removed == 0, "the transform is known, and has none any more"
    assert client.transforms.results().total == 3
    assert client.transforms.remove_results(key=VAL).removed == 1
    done = served.count()
    get(served.url(seed=1))
    assert served.count() == done + served.samples()
    removed = client.transforms.remove_results(everything=True)
    assert removed.removed >= 2
    wait_until(lambda: client.transforms.results().total == 0 or bool(served.spools()), "something is left")


def test_who_reads_what_is_removed_reads_it_to_its_end(served: Served, client: Client) -> None:
    url = served.url(seed=4)
    keep(client, url)
    with Reader(url) as reader:
        reader.begin()
        [result] = client.transforms.results().results
        assert result.readers == 1
        client.transforms.remove_results(served.uuid)
        answer = reader.finish()
    assert f'"{result.etag}"' == answer.etag
    assert len(answer.body) == result.size


def test_removing_results_of_a_transform_that_there_is_not_says_so(client: Client, kept: tuple[str, str]) -> None:
    name = kept[0].partition("@")[0]
    for unknown in ("absent", f"absent@{'0' * 12}", f"{name}@{'0' * 12}"):
        with pytest.raises(TransformNotFound, match=rf"no transform '{unknown}'"):
            client.transforms.remove_results(unknown)
    assert client.transforms.remove_results(name).removed == 2


def test_results_of_a_transform_that_was_removed_can_be_removed(client: Client, kept: tuple[str, str]) -> None:
    name = kept[0].partition("@")[0]
    client.transforms.remove(name)
    assert client.transforms.remove_results(name).removed == 2
    with pytest.raises(TransformNotFound, match=f"no transform {name!r}"):
        client.transforms.remove_results(name)


def test_removing_everything_must_be_said(client: Client) -> None:
    with pytest.raises(BadRequest, match="all=true"):
        client.transforms.remove_results()
    with pytest.raises(BadRequest, match="no transform"):
        client.transforms.remove_results("crop", everything=True)
    api = f"{client.endpoint}/api/results"
    assert get(f"{api}?all=perhaps", method="DELETE").status == 400
    assert get(f"{api}?transform=No+name", method="DELETE").status == 400
    assert get(f"{api}?all=true").status == 400, "it is no parameter of GET"
    assert get(f"{api}?limit=-1").status == 400
    assert get(api, method="PUT").status == 405


def test_a_node_that_keeps_nothing_lists_nothing(shards: Path) -> None:
    with serving(shards, "--results", "off") as served:
        get(served.url(seed=1))
        found = served.client.transforms.results()
        assert (found.results, found.total, found.used, found.capacity) == ([], 0, 0, 0)
        assert served.client.transforms.remove_results(everything=True).removed == 0
        served.client.close()
        assert metric(served.client, "shardmill_transformed_reads_total", outcome="started") == 1
        assert "shardmill_results" not in served.client.metrics()
        served.client.close()


def test_the_document_has_what_is_answered(client: Client, kept: tuple[str, str]) -> None:
    document = json.loads(get(f"{client.endpoint}/api/openapi.json").body)
    operations = document["paths"]["/api/results"]
    assert {parameter["name"] for parameter in operations["get"]["parameters"]} == {
        "transform",
        "bucket",
        "key",
        "limit",
    }
    assert {parameter["name"] for parameter in operations["delete"]["parameters"]} == {
        "transform",
        "bucket",
        "key",
        "all",
    }
    answer = json.loads(get(f"{client.endpoint}/api/results").body)
    fields = document["components"]["schemas"]
    assert set(answer) == set(fields["Results"]["properties"])
    assert set(answer["results"][0]) == set(fields["ResultInfo"]["properties"])
    assert msgspec.convert(answer, Results).total == 4


def test_the_metrics_tell_what_is_kept_and_what_readers_were_given(shards: Path) -> None:
    with serving(shards, "--results-capacity", "20MiB") as served:
        client = served.client

        def reads() -> dict[str, int]:
            outcomes = ("hit", "joined", "started")
            return {
                outcome: int(metric(client, "shardmill_transformed_reads_total", outcome=outcome))
                for outcome in outcomes
            }

        url = served.url(seed=1)
        with Reader(url) as one, Reader(url) as other:
            one.begin()
            other.begin()
            assert reads() == {"hit": 0, "joined": 1, "started": 1}
            whole = one.finish()
        keep(client, url)
        assert reads()["hit"] == 1
        get(served.url(seed=1, epoch=1))
        wait_until(lambda: metric(client, "shardmill_results", kind="scratch") == 1, "the result is not kept")
        found = client.transforms.results()
        client.close()
        assert metric(client, "shardmill_results", kind="kept") == found.total - 1
        assert metric(client, "shardmill_results_bytes", state="finished") == found.bytes
        assert metric(client, "shardmill_results_bytes", state="growing") == 0
        assert metric(client, "shardmill_results_capacity_bytes") == 20 << 20
        for seed in range(2, 3 + (20 << 20) // len(whole.body)):
            keep(client, served.url(seed=seed))
        assert metric(client, "shardmill_results_evicted_total") >= 1


Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command; gives status, standard output and standard error."""
    monkeypatch.setenv("SHARDMILL_ENDPOINT", served.node.endpoint)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run(arguments)
        return status, *capfd.readouterr()

    return execute


def test_the_command_lists_and_removes(served: Served, client: Client, kept: tuple[str, str], shell: Shell) -> None:
    status, out, err = shell("transform", "results", "ls")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["SIZE", "AGE", "USED", "KEPT", "READERS", "SPEC", "OBJECT"]
    assert [f"{BUCKET}/{name}" in line for line, name in zip(lines[1:], [OTHER, OTHER, OTHER, VAL], strict=True)] == [
        True
    ] * 4
    assert ["scratch" in line for line in lines[1:]] == [False, False, True, False]
    assert f"{served.uuid},seed=1,epoch=2" in lines[3]
    assert err.startswith("4 results, ")
    assert "of 10.0 GiB" in err

    status, out, err = shell("transform", "results", "ls", "shrink", "--limit", "1", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["transform"] == kept[1]
    status, out, err = shell("transform", "results", "ls", "shrink", "--limit", "1")
    assert "2 results, 1 not shown" in err

    status, out, err = shell("transform", "results", "rm")
    assert (status, out) == (2, "")
    assert "--all" in err
    assert shell("transform", "results", "rm", "crop", "--all")[0] == 2
    status, out, err = shell("transform", "results", "rm", "shrink", "--key", OTHER, "--json")
    assert json.loads(out)["removed"] == 2
    status, out, err = shell("transform", "results", "rm", "--all")
    assert (status, out) == (0, "")
    assert err.startswith("removed 2 results, ")
    status, out, err = shell("transform", "results", "ls")
    assert (status, out) == (0, "")
    assert err.startswith("0 results, 0 B; 0 B of ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1.0, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m"), (7199, "1h"), (86400, "1d"), (200_000, "2d"), (3599, "59m")],
)
def test_ages_are_told_in_their_largest_unit(seconds: float, text: str) -> None:
    assert age_text(seconds) == text
