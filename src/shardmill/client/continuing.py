"""A transformed shard that is read while it is made, and goes on at the sample where it was cut.

The bytes of a seeded sample are the same whenever they are made, so the shard is asked for again from the sample that
was cut, and what has arrived of that sample is dropped. The node says by a header which object version and environment
the bytes come from; where that has changed, nothing is glued together.
"""

import time
from typing import TypeVar

import msgspec

from shardmill.client.answers import Answer, NodeUnreachable, TruncatedBody
from shardmill.client.http import Transport
from shardmill.core.api import FailureInfo, Failures
from shardmill.core.errors import Conflict, ShardmillError, TransformFailed
from shardmill.core.paths import parse_transformed_path, transformed_path
from shardmill.core.refs import ObjectRef
from shardmill.shards.framing import end_padding
from shardmill.shards.tracking import SampleTracker

WAITS = (0.1, 0.5, 1.0, 2.0, 4.0)  # seconds before each try to go on; a node is restarted in less
ORIGIN = "shardmill-origin"
_DROP = 1 << 20
_FILL = 1 << 20  # bytes that a cut costs at most


Data = TypeVar("Data", bytes, memoryview)


class ShardBody:
    """The body of one transformed shard. Resources: `close` it."""

    def __init__(self, transport: Transport, ref: ObjectRef, path: str, answer: Answer) -> None:
        self._transport = transport
        self._ref = ref
        self._answer = answer
        self._path = path
        self._seed = answer.headers.get("shardmill-seed")
        self._origin = answer.headers.get(ORIGIN)
        self._tracker = SampleTracker()
        self._received = 0
        self._tries = 0
        self._is_continued = False

    def read_some(self, limit: int) -> bytes:
        """What has arrived, at most `limit` bytes; empty at the end.

        Raises:
            TransformFailed: The run failed.
            TruncatedBody: It was cut, and cannot be continued.
            Conflict: It was cut, and object or environment have changed since.
        """
        while True:
            try:
                data = self._answer.read_some(limit)
            except TruncatedBody as error:
                self._go_on(error)
                continue
            if not self._is_continued:
                if self._origin is not None:
                    self._tracker.feed(data)
                return self._hand_out(data)
            if data:
                self._tracker.feed(data)
                if not (data := data[: self._left(len(data))]):
                    continue
                return self._hand_out(data)
            return self._hand_out(bytes(min(self._left(0), limit)))

    def fill(self, view: memoryview) -> int:
        """Fill the buffer as far as the body goes; fewer bytes only at the end. Raises like `read_some`."""
        filled = 0
        while filled < len(view):
            if self._is_continued:
                data = self.read_some(len(view) - filled)
                view[filled : filled + len(data)] = data
                count = len(data)
            else:
                part = view[filled : filled + _FILL]
                try:
                    count = self._answer.fill(part)
                except TruncatedBody as error:
                    # What came of this part is asked for again with the rest of its sample.
                    self._go_on(error)
                    continue
                if self._origin is not None:
                    self._tracker.feed(part[:count])
                self._hand_out(part[:count])
            if not count:
                break
            filled += count
        return filled

    def close(self) -> None:
        self._answer.close()

    def _hand_out(self, data: Data) -> Data:
        self._received += len(data)
        if data:
            self._tries = 0
        return data

    def _left(self, otherwise: int) -> int:
        """Bytes up to the end, once that is known: what a part is padded to is not what the whole is padded to."""
        end = self._tracker.end
        return otherwise if end is None else end + end_padding(end) - self._received

    def _go_on(self, error: TruncatedBody) -> None:
        """Ask for the shard from the sample that was cut, and drop what is here of it.

        *Recovery:* from a cut connection, a node that is gone for some seconds; tried as long as bytes come in between.
        """
        failures = self._failures()
        fatal = next((failure for failure in reversed(failures or ()) if failure.ended_run), None)
        if fatal is not None:
            raise self._explained(fatal) from error
        if self._origin is None or self._tries >= len(WAITS):
            raise self._unexplained(error, failures) from error
        time.sleep(WAITS[self._tries])
        self._tries += 1
        try:
            answer = self._transport.request("GET", self._rest())
        except NodeUnreachable as gone:
            self._go_on(TruncatedBody(str(gone)))
            return
        if answer.headers.get(ORIGIN) != self._origin:
            answer.close()
            raise Conflict(f"{self._ref} or its environment changed while it was being read; read it again") from error
        self._answer = answer
        self._is_continued = True
        dropped = self._received - self._tracker.rewind()
        while dropped:
            try:
                data = answer.read_some(min(dropped, _DROP))
            except TruncatedBody as again:
                self._tracker.position = self._received
                self._go_on(again)
                return
            if not data:
                raise TruncatedBody(f"{self._ref}, transformed: the continuation is shorter than what arrived before")
            self._tracker.feed(data)
            dropped -= len(data)

    def _rest(self) -> str:
        """The path of the shard from the sample that was cut."""
        named = parse_transformed_path(self._path)
        spec = named.spec
        seed = int(self._seed) if spec.seed is None and self._seed is not None else None
        ordinal = self._tracker.ordinal
        if ordinal is None:
            return transformed_path(named.ref, spec.with_options(seed=seed))
        count = None if spec.count is None else spec.count - (ordinal - spec.start)
        return transformed_path(named.ref, spec.with_options(seed=seed, start=ordinal, count=count))

    def _failures(self) -> list[FailureInfo] | None:
        """What the node recorded of this read; None: nobody answers."""
        query = {"request": self._answer.request_id or ""}
        try:
            with self._transport.request("GET", "/api/transforms/errors", query=query) as answer:
                return msgspec.json.decode(answer.read_all(), type=Failures).failures
        except (NodeUnreachable, TruncatedBody):
            return None
        except ShardmillError:
            return []

    def _explained(self, failure: FailureInfo) -> TransformFailed:
        message = failure.message
        if failure.sample and not message.startswith("sample "):
            message = f"sample {failure.sample!r}: {message}"
        return TransformFailed(
            f"transform {failure.transform} failed at {self._ref}: {message}",
            traceback=failure.traceback,
            request_id=self._answer.request_id,
        )

    def _unexplained(self, error: TruncatedBody, failures: list[FailureInfo] | None) -> Exception:
        if failures is None:
            return TruncatedBody(f"the node stopped while it was sending {self._ref}")
        if failures:
            return self._explained(failures[-1])
        return TruncatedBody(f"{self._ref}, transformed: {error} (request {self._answer.request_id})")
