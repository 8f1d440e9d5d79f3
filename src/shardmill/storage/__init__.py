"""Bytes at rest: pool, directories, and the set of a node's buckets."""
