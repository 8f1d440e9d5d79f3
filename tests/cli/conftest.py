"""The node that these tests speak to."""

from tests.serving import client, fonts_are_open, node

__all__ = ["client", "fonts_are_open", "node"]
