"""The SDK: talk to a node, name objects by URL, register transforms."""

from shardmill.client.answers import NodeUnreachable, TruncatedBody
from shardmill.client.batch import BatchItem
from shardmill.client.client import Client
from shardmill.client.handles import BucketHandle, MemberHandle, ObjectHandle, Stored
from shardmill.client.jobs import JobFailed, JobsHandle
from shardmill.client.reading import ObjectReader
from shardmill.client.registered import Pipeline, WDTransform
from shardmill.client.transforms import TransformsHandle

__all__ = [
    "BatchItem",
    "BucketHandle",
    "Client",
    "JobFailed",
    "JobsHandle",
    "MemberHandle",
    "NodeUnreachable",
    "ObjectHandle",
    "ObjectReader",
    "Pipeline",
    "Stored",
    "TransformsHandle",
    "TruncatedBody",
    "WDTransform",
]
