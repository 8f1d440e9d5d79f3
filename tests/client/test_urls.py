"""URLs: what the client names without asking anybody."""

import pickle

import pytest

from shardmill.client import Client
from shardmill.client.http import DEFAULT_ENDPOINT
from shardmill.core.errors import BadRequest
from shardmill.core.paths import parse_object_path, parse_transformed_path
from shardmill.core.refs import Bucket, ObjectRef

UUID = "imagenet-train@1f3a9c2e0b1d"


@pytest.fixture
def client() -> Client:
    """Of an endpoint where nothing listens: any request would fail."""
    return Client("http://127.0.0.1:9")


def test_the_endpoint_comes_from_the_call_then_the_environment_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SHARDMILL_ENDPOINT", raising=False)
    assert Client().endpoint == DEFAULT_ENDPOINT
    monkeypatch.setenv("SHARDMILL_ENDPOINT", "http://node:1234/")
    assert Client().endpoint == "http://node:1234"
    assert Client("other:99").endpoint == "http://other:99"


@pytest.mark.parametrize("endpoint", ["ftp://host", "http://", "http://host:port", "http://host?x=1"])
def test_an_endpoint_that_is_none_is_a_value_error(endpoint: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        Client(endpoint)


def test_a_client_survives_pickling_and_shows_no_token() -> None:
    client = pickle.loads(pickle.dumps(Client("http://node:1", token="secret")))
    assert client.endpoint == "http://node:1"
    assert client._token == "secret"
    assert "secret" not in repr(client)


def test_an_object_url_is_the_plain_object_and_aliases_become_providers(client: Client) -> None:
    url = client.object_url("gcp://sharded-imagenet", "train/imagenet-train-000000.tar")
    assert url == "http://127.0.0.1:9/o/gs/sharded-imagenet/train/imagenet-train-000000.tar"


def test_a_transformed_url_has_everything_in_its_last_segment(client: Client) -> None:
    url = client.object_url("gs://imgs", "train/a.tar", transform_id=UUID + ",errors=skip:0.01", seed=7, epoch=3)
    assert url.startswith(f"http://127.0.0.1:9/t/gs/imgs/train/{UUID},seed=7,epoch=3,errors=skip:0.01,k=")
    named = parse_transformed_path(url.removeprefix("http://127.0.0.1:9"))
    assert named.ref == ObjectRef(Bucket("gs", "imgs"), "train/a.tar")
    assert (named.spec.seed, named.spec.epoch) == (7, 3)


def test_arguments_of_the_call_override_those_of_the_spec(client: Client) -> None:
    url = client.object_url("gs://imgs", "a.tar", UUID + ",seed=1,epoch=2", seed=5, epoch=6, start=10, count=20)
    assert ",seed=5,epoch=6,start=10,count=20,k=" in url


@pytest.mark.parametrize(
    "key", ["a{0..3}.tar", "a$b", "a;b::c:d", "ä ö", "a%20b", "a?b#c", "~x@y,z=1", "a//b", "../up"]
)
def test_literal_keys_are_encoded_so_that_nothing_expands_or_splits_them(client: Client, key: str) -> None:
    path = client.object_url("gs://imgs", key).removeprefix("http://127.0.0.1:9")
    assert not set("{}$;:?# ") & set(path)
    assert parse_object_path(path).key == key
    transformed = client.object_url("gs://imgs", key, UUID).removeprefix("http://127.0.0.1:9")
    assert parse_transformed_path(transformed).ref.key == key


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("gs://imgs", "a.tar", "imagenet-train"), {}),
        (("gs://imgs", "a.tar", UUID), {"epoch": 1}),
        (("gs://imgs", "a.tar", UUID), {"seed": -1}),
        (("gs://imgs", "a.tar"), {"seed": 1}),
        (("gs://imgs", "d/"), {"transform_id": UUID}),
        (("gs://imgs", "x" * 230, UUID), {}),
        (("imgs", "a.tar"), {}),
        (("gs://imgs", ""), {}),
    ],
)
def test_what_has_no_url_is_a_value_error(client: Client, arguments: tuple[str, ...], options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        client.object_url(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("val-{000000..000002}.tar", ["val-000000.tar", "val-000001.tar", "val-000002.tar"]),
        ("val-{0..10..5}.tar", ["val-0.tar", "val-5.tar", "val-10.tar"]),
        ("val-@2.tar", ["val-0.tar", "val-1.tar", "val-2.tar"]),
        ("{train,val}/a.tar", ["train/a.tar", "val/a.tar"]),
    ],
)
def test_templates_expand_without_a_network(client: Client, template: str, names: list[str]) -> None:
    urls = client.expand_object_urls("gs://imgs", template=template)
    assert urls == [f"http://127.0.0.1:9/o/gs/imgs/{name}" for name in names]
    assert client.expand_object_urls("gs://imgs", names=names) == urls
    transformed = client.expand_object_urls("gs://imgs", UUID, template, seed=1, epoch=2)
    assert transformed == [client.object_url("gs://imgs", name, UUID, seed=1, epoch=2) for name in names]


def test_exactly_one_of_template_names_and_prefix(client: Client) -> None:
    for choice in ({}, {"template": "a", "prefix": "b"}, {"names": ["a"], "template": "b"}):
        with pytest.raises(BadRequest, match="exactly one"):
            client.expand_object_urls("gs://imgs", **choice)
    with pytest.raises(BadRequest, match="not one string"):
        client.expand_object_urls("gs://imgs", names="a.tar")


def test_a_template_with_a_star_says_how_to_list_instead() -> None:
    with pytest.raises(BadRequest, match="list by prefix='train/shard-'"):
        Client("http://node").expand_object_urls("gs://bkt", template="train/shard-*.tar")
    assert Client("http://node").expand_object_urls("gs://bkt", names=["a*b"]) == ["http://node/o/gs/bkt/a%2Ab"]
