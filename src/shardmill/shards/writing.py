"""Writing shards: samples in, a deterministic tar out.

Fields stand in the order in which WebDataset's TarWriter writes them, and a name that would be read back as another
key or field is refused instead of written.
"""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import BinaryIO, Self

from shardmill.shards.encoding import encode
from shardmill.shards.framing import FramedField, end_padding, frame_into, framed_size
from shardmill.shards.grouping import is_meta, split_name


def member_order(names: Iterable[str]) -> list[str]:
    """A sample's fields in TarWriter's order: sorted, without those that start with an underscore."""
    return sorted(name for name in names if name[:1] != "_")


def member_name(key: str, field: str) -> str:
    """The member's name for a field, `key.field`.

    Raises:
        ValueError: Readers would not find this key and field in it: the key has a dot behind its last slash, say.
    """
    name = f"{key}.{field}"
    if split_name(name) != (key, field.lower()) or is_meta(name) or "\0" in name:
        raise ValueError(
            f"a member {name!r} would not be read back as field {field!r} of sample {key!r}; no dot may "
            "follow the last slash of a key, and no slash stand in a field"
        )
    return name


class ShardWriter:
    """Writes samples into an open file. Resources: `close` ends the archive; the file stays the caller's to close."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        mtime: int = 0,
        mode: int = 0o444,
        uid: int = 0,
        gid: int = 0,
        uname: str = "bigdata",
        gname: str = "bigdata",
    ) -> None:
        """Args:
        file: Only `write` is called.
        mtime: Seconds, for every member; so are the others. The defaults are TarWriter's, but for its clock.
        mode: Permission bits.
        uid: Owner's number.
        gid: Group's number.
        uname: Owner's name.
        gname: Group's name.
        """
        self._file = file
        self._header: dict[str, int] = {"mtime": mtime, "mode": mode, "uid": uid, "gid": gid}
        self._uname = uname
        self._gname = gname
        self._last_key: str | None = None
        self._total = 0
        self._is_closed = False

    def write(self, sample: Mapping[str, object]) -> int:
        """Add one sample: `__key__` and fields, encoded by their names.

        Returns:
            Bytes written.

        Raises:
            EncodeError: A value does not fit its field.
            ValueError: There is no usable key, it is the last sample's, or two fields differ only in case.
        """
        if self._is_closed:
            raise ValueError("the shard is closed")
        key = sample.get("__key__")
        if not (isinstance(key, str) and key):
            raise ValueError(f"a sample needs a str as __key__, not {key!r}")
        if key == self._last_key:
            raise ValueError(f"two adjacent samples have the key {key!r}; readers would take them for one")
        names = member_order(sample)
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"sample {key!r} has fields that differ only in case: {', '.join(names)}")
        fields = [self._framed(member_name(key, name), name, sample[name]) for name in names]
        buffer = bytearray(framed_size(fields))
        frame_into(memoryview(buffer), fields)
        self._file.write(buffer)
        self._total += len(buffer)
        self._last_key = key
        return len(buffer)

    def close(self) -> None:
        """Write the end of the archive; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._file.write(bytes(end_padding(self._total)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Without its end an abandoned shard is recognised as incomplete.
        if kind is None:
            self.close()
        self._is_closed = True

    def _framed(self, name: str, field: str, value: object) -> FramedField:
        return FramedField(name, encode(field, value), **self._header, uname=self._uname, gname=self._gname)
