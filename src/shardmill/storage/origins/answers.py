"""What a store's status codes mean here; the one place where they become errors."""

from shardmill.core.errors import (
    BackendBusy,
    BackendDenied,
    BackendTimeout,
    BackendUnavailable,
    ObjectChanged,
    ObjectNotFound,
    RangeNotSatisfiable,
    ShardmillError,
)


def error_of(
    status: int, label: str, *, tried: str, retry_after: int | None = None, size: int | None = None
) -> ShardmillError:
    """The error that an answer with this status to a reading request is.

    Args:
        status: No success.
        label: Of the object or bucket that was asked for.
        tried: Sources of credentials, as a sentence.
        retry_after: Seconds, if the answer had them.
        size: Bytes of the object, if the answer had them.
    """
    if status in (401, 403):
        return BackendDenied(f"{label}: the store refused it with {status}; {tried}")
    if status in (404, 410):
        return ObjectNotFound(f"no object {label}")
    if status == 412:
        return ObjectChanged(f"{label} was replaced; read it again")
    if status == 416:
        return RangeNotSatisfiable(f"{label}: the range starts at or past its end", size=size)
    if status in (429, 503):
        return BackendBusy(f"{label}: the store is overloaded ({status})", retry_after=retry_after or 1)
    if status in (408, 504):
        return BackendTimeout(f"{label}: the store took too long ({status})")
    if 300 <= status < 400:
        return BackendUnavailable(f"{label}: the store points elsewhere ({status}); are endpoint and region right?")
    return BackendUnavailable(f"{label}: the store answered {status}")
