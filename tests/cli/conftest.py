"""The node that these tests speak to."""

from tests.serving import client, node

__all__ = ["client", "node"]
