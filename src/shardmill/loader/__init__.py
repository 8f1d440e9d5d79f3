"""Batches for training, from shards of a node: `ShardLoader` gives numpy arrays, `shardmill.torch` tensors."""

from shardmill.loader.batches import ShardLoader

__all__ = ["ShardLoader"]
