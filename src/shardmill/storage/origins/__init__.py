"""Stores behind remote buckets; `open_origin` gives one by a bucket's settings."""

from shardmill.storage.origins.opening import open_origin

__all__ = ["open_origin"]
