"""Batches for training, from shards of a node: `ShardLoader` gives numpy arrays, `shardmill.torch` tensors."""

from shardmill.loader.batches import ShardLoader
from shardmill.loader.read_ahead import IterationEnded

__all__ = ["IterationEnded", "ShardLoader"]
