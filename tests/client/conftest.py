"""The nodes that these tests speak to: a real one, and ones that misbehave."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from shardmill.client import Client
from tests.client.scripted import ObjectNode, ScriptedNode
from tests.serving import client, fonts_are_open, node

__all__ = ["client", "fonts_are_open", "node"]


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[ScriptedNode, Client]]]:
    with contextlib.ExitStack() as stack:

        def build(*script: bytes | None) -> tuple[ScriptedNode, Client]:
            node = ScriptedNode(list(script))
            stack.callback(node.close)
            return node, stack.enter_context(Client(node.endpoint))

        yield build


@pytest.fixture
def serving() -> Iterator[Callable[..., tuple[ObjectNode, Client]]]:
    with contextlib.ExitStack() as stack:

        def build(body: bytes, **options: bool) -> tuple[ObjectNode, Client]:
            node = ObjectNode(body, **options)
            stack.callback(node.close)
            return node, stack.enter_context(Client(node.endpoint))

        yield build
