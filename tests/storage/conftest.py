"""Assertions of the shipped suite say what they compared, as those of the tests do."""

import pytest

pytest.register_assert_rewrite("shardmill.testing.stores")
