"""The nodes that other people's clients speak to."""

from tests.server.conftest import notes, wire

__all__ = ["notes", "wire"]
