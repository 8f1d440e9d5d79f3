"""Two registrations of one function with different arguments: versions of their own, from the URL to the records."""

from typing import Any

import pytest

from shardmill import WDTransform
from shardmill.client import Client
from shardmill.client.shards import read_stream
from shardmill.core.errors import BadRequest, TransformFailed, TransformNotFound
from shardmill.core.specs import Spec
from tests.client.test_transforms import IMAGENET, SHARD

Sample = dict[str, Any]


def stamp(sample: Sample, text: str = "plain", times: int = 1) -> Sample:
    if text == "refuse":
        raise ValueError("refused by argument")
    return {"__key__": sample["__key__"], "txt": text * times}


def registered(client: Client, **args: object) -> WDTransform:
    return WDTransform(client, stamp, transform_name="arg-stamp", errors="fail", args=args)


def texts(client: Client, uuid: str) -> set[bytes]:
    with client.bucket(IMAGENET).object(SHARD).get(uuid, count=3) as reader:
        return {sample.fields["txt"] for sample in read_stream(reader)}


def test_one_function_with_different_arguments_is_different_versions(client: Client) -> None:
    plain, twice, other = registered(client), registered(client, text="a", times=2), registered(client, text="b")
    assert len({plain.uuid, twice.uuid, other.uuid}) == 3
    assert len({Spec.parse(etl.uuid).digest for etl in (plain, twice, other)}) == 1
    for _ in range(2):
        assert [texts(client, etl.uuid) for etl in (plain, twice, other)] == [{b"plain"}, {b"aa"}, {b"b"}]
    assert registered(client, times=2, text="a").uuid == twice.uuid


def test_arguments_are_part_of_the_url_and_of_its_headers(client: Client) -> None:
    etl = registered(client, text="header")
    args = Spec.parse(etl.uuid).args
    url = client.object_url(IMAGENET, SHARD, etl.uuid, seed=1)
    assert f",seed=1,args={args},k=" in url
    head = client._transport.request("HEAD", url.removeprefix(client.endpoint))
    with head:
        assert head.headers["Shardmill-Transform"] == etl.uuid
    unknown = str(Spec.parse(etl.uuid)).replace(str(args), "0" * 12)
    with pytest.raises(TransformNotFound, match="args=000000000000"):
        texts(client, unknown)


def test_records_and_counts_are_those_of_the_arguments(client: Client) -> None:
    good, bad = registered(client, text="fine"), registered(client, text="refuse")
    texts(client, good.uuid)
    with pytest.raises(TransformFailed, match="refused by argument"):
        texts(client, bad.uuid)
    assert bad.errors().total > 0
    assert {failure.transform for failure in bad.errors().failures} == {bad.uuid}
    assert good.errors().total == 0
    assert client.transforms.errors(bad.uuid.partition(",")[0]).total >= bad.errors().total
    assert good.statistics().samples >= 3
    assert bad.statistics().samples == 0
    assert client.transforms.get(good.uuid).transform.args == {"text": "fine"}
    assert client.transforms.get(bad.uuid).transform.args == {"text": "refuse"}


def test_a_version_is_removed_with_its_arguments_only(client: Client) -> None:
    kept, gone = registered(client, text="kept"), registered(client, text="gone")
    client.transforms.remove(gone.uuid)
    with pytest.raises(TransformNotFound):
        texts(client, gone.uuid)
    with pytest.raises(TransformNotFound):
        client.transforms.get(gone.uuid)
    assert texts(client, kept.uuid) == {b"kept"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_arguments_that_json_cannot_say_are_refused_before_anything_is_sent(client: Client, value: object) -> None:
    with pytest.raises(BadRequest, match="args"):
        registered(client, text=value)
