"""The OpenAPI document against a validator, against the routes, and against what they answer."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from shardmill.config import load_config
from shardmill.jobs.registry import Jobs
from shardmill.node.node import Node
from shardmill.server.app import App
from tests.etl.support import request_for
from tests.server.wire import Wire, request

SHARD = "imagenet-train-000000.tar"


@pytest.fixture(scope="module")
def document(wire: Wire) -> dict[str, Any]:
    answer = wire.get("/api/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def filled(path: str) -> str:
    """A documented path with names in it that are nobody's."""
    for name, value in (
        ("provider", "ais"),
        ("bucket", "nobodys"),
        ("key", "k"),
        ("path", "t~k"),
        ("name", "nobodys"),
        ("id", "0" * 16),
    ):
        path = path.replace(f"{{{name}}}", value)
    assert "{" not in path
    return path


def test_it_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def test_it_has_every_route_with_its_methods_and_no_other(wire: Wire, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        with wire.connect() as peer:
            peer.send(request("PATCH", filled(path)))
            answer = peer.read()
        assert answer.status == 405, path
        allowed = {method.lower() for method in answer.headers["allow"].split(", ")}
        assert allowed == {*operations, *(["head"] if "get" in operations else [])}, path


async def served_routes(data: Path) -> dict[str, set[str]]:
    """Documented path or its beginning → methods, of a node that is opened for it."""
    config = load_config(environ={}, flags={"server": {"data": data}})
    with ThreadPoolExecutor(1) as threads:
        async with Node.open(config) as node, Jobs.open(node) as jobs:
            return {path: set(methods) for path, methods in App(node, jobs, threads).routes.items()}


def test_no_route_is_left_out(document: dict[str, Any], tmp_path: Path) -> None:
    documented: dict[str, set[str]] = {}
    for path, operations in document["paths"].items():
        begun = path.partition("{")[0]
        documented.setdefault(begun, set()).update(method.upper() for method in operations if method != "head")
    assert documented == asyncio.run(served_routes(tmp_path / "data"))


def test_parameters_are_those_that_are_known(wire: Wire, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if not path.startswith("/api/"):
            continue
        for method, operation in operations.items():
            query = [item["name"] for item in operation["parameters"] if item["in"] == "query"]
            answer = wire.ask(method.upper(), f"{filled(path)}?surely-not=1")
            assert answer.status == 400, (method, path)
            known = answer.message.partition("known: ")[2]
            assert known.split(", ") == (query or [""]), (method, path)


def test_answers_are_as_described(wire: Wire, document: dict[str, Any]) -> None:
    wire.post_json(
        "/api/transforms", request_for("def transform(sample):\n    1 / 0\n", name="described", decoder=None)
    )
    assert wire.get(f"/t/gs/sharded-imagenet/described~{SHARD}").status == 422
    for path, asked in (
        ("/api/buckets", "/api/buckets"),
        ("/api/objects", "/api/objects?bucket=gs://sharded-imagenet&delimiter=/"),
        ("/api/transforms", "/api/transforms"),
        ("/api/transforms/{name}", "/api/transforms/described"),
        ("/api/transforms/errors", "/api/transforms/errors?transform=described"),
        ("/api/config", "/api/config"),
        ("/api/jobs", "/api/jobs"),
    ):
        operation = document["paths"][path]["get"]
        found = wire.get(asked)
        assert found.status == 200
        check(document, operation["responses"]["2XX"], found.json())
        failed = wire.get(f"{asked}{'&' if '?' in asked else '?'}surely-not=1")
        check(document, operation["responses"]["default"], failed.json())


def check(document: dict[str, Any], response: dict[str, Any], answer: object) -> None:
    schema = response["content"]["application/json"]["schema"]
    whole = {**schema, "components": document["components"]}
    OAS31Validator(whole).validate(json.loads(json.dumps(answer)))
    # And the schema says something: it refuses what is none.
    assert not OAS31Validator(whole).is_valid({"surely": "not"})
