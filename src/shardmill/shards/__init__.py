"""The shard format: tar as WebDataset writes and reads it. Standard library only, so that any interpreter runs it."""

from shardmill.shards.decoding import IMAGE_SPECS, Decoder, MissingDecoder, PickleRefused
from shardmill.shards.encoding import EncodeError, encode
from shardmill.shards.framing import (
    END_OF_ARCHIVE,
    RECORD,
    FramedField,
    end_padding,
    frame_into,
    framed_size,
    padding,
    tar_header,
)
from shardmill.shards.grouping import Field, Sample, split_name
from shardmill.shards.index import ShardIndex
from shardmill.shards.members import BadIndex, Extent, IndexBuilder, MemberIndex
from shardmill.shards.payloads import BytesPayload, NpyPayload, Payload
from shardmill.shards.tar import Member, TarError, TarHeaders, iter_stream
from shardmill.shards.writing import ShardWriter, member_name, member_order

__all__ = [
    "END_OF_ARCHIVE",
    "IMAGE_SPECS",
    "RECORD",
    "BadIndex",
    "BytesPayload",
    "Decoder",
    "EncodeError",
    "Extent",
    "Field",
    "FramedField",
    "IndexBuilder",
    "Member",
    "MemberIndex",
    "MissingDecoder",
    "NpyPayload",
    "Payload",
    "PickleRefused",
    "Sample",
    "ShardIndex",
    "ShardWriter",
    "TarError",
    "TarHeaders",
    "encode",
    "end_padding",
    "frame_into",
    "framed_size",
    "iter_stream",
    "member_name",
    "member_order",
    "padding",
    "split_name",
    "tar_header",
]
