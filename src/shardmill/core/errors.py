"""The error tree: raised by a node, carried on the wire by `code`, raised again by the SDK.

ShardmillError                                       code                     status  retry
├─ BadRequest            (ValueError)                bad_request              400     no
├─ Unauthenticated       (PermissionError)           unauthenticated          401     no
├─ AccessDenied          (PermissionError)           access_denied            403     no
│  ├─ BucketReadOnly                                 bucket_read_only         403     no
│  └─ BackendDenied                                  backend_denied           403     no: the origin refused the node
├─ NotFound              (FileNotFoundError)         not_found                404     no
│  ├─ BucketNotFound                                 bucket_not_found         404     no
│  ├─ ObjectNotFound                                 object_not_found         404     no
│  ├─ MemberNotFound                                 member_not_found         404     no
│  └─ TransformNotFound                              transform_not_found      404     no
├─ MethodNotAllowed                                  method_not_allowed       405     no
├─ RequestTimeout        (TimeoutError)              request_timeout          408     no
├─ Conflict                                          conflict                 409     no
│  └─ ObjectChanged                                  object_changed           409     no: replaced while it was read
├─ PreconditionFailed                                precondition_failed      412     no
├─ TooLarge                                          too_large                413     no
├─ UnsupportedMediaType                              unsupported_media_type   415     no
├─ RangeNotSatisfiable                               range_not_satisfiable    416     no
├─ ExpectationFailed                                 expectation_failed       417     no
├─ TransformFailed                                   transform_failed         422     no: user code, or a cap
│  ├─ BadShard                                       bad_shard                422     no: not a good tar
│  ├─ SampleOutOfRange                               sample_out_of_range      422     no
│  └─ EnvironmentUnfit                               environment_unfit        422     no: none fits
├─ ServerError                                       internal                 500     no
│  └─ CorruptObject                                  corrupt_object           500     no
├─ BackendUnavailable    (ConnectionError)           backend_unavailable      502     yes
│  ├─ BackendBusy                                    backend_busy             503     yes, after Retry-After
│  └─ BackendTimeout     (TimeoutError)              backend_timeout          504     yes
├─ Busy                                              busy                     503     yes, after Retry-After
└─ InsufficientStorage   (OSError)                   insufficient_storage     507     no
"""

from collections.abc import Iterator
from typing import ClassVar


class ShardmillError(Exception):
    """Anything a node answers with an error status."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        traceback: str | None = None,
        request_id: str | None = None,
        retry_after: int | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.traceback = traceback
        """The user's own traceback, with the client's file names; never one of the server."""
        if traceback:
            # Python prints notes below an error that nobody catches: so a script says where in the function it failed.
            self.add_note(f"In the transform:\n{traceback.rstrip()}")
        self.request_id = request_id
        self.retry_after = retry_after
        """Seconds; sent as Retry-After."""
        self.size = size
        """Bytes of the object, for `Content-Range: bytes */SIZE`."""

    def __str__(self) -> str:
        return self.message


class BadRequest(ShardmillError, ValueError):
    code = "bad_request"
    status = 400


class Unauthenticated(ShardmillError, PermissionError):
    code = "unauthenticated"
    status = 401


class AccessDenied(ShardmillError, PermissionError):
    code = "access_denied"
    status = 403


class BucketReadOnly(AccessDenied):
    code = "bucket_read_only"


class BackendDenied(AccessDenied):
    code = "backend_denied"


class NotFound(ShardmillError, FileNotFoundError):
    code = "not_found"
    status = 404


class BucketNotFound(NotFound):
    code = "bucket_not_found"


class ObjectNotFound(NotFound):
    code = "object_not_found"


class MemberNotFound(NotFound):
    code = "member_not_found"


class TransformNotFound(NotFound):
    code = "transform_not_found"


class MethodNotAllowed(ShardmillError):
    code = "method_not_allowed"
    status = 405


class RequestTimeout(ShardmillError, TimeoutError):
    code = "request_timeout"
    status = 408


class Conflict(ShardmillError):
    code = "conflict"
    status = 409


class ObjectChanged(Conflict):
    code = "object_changed"


class PreconditionFailed(ShardmillError):
    code = "precondition_failed"
    status = 412


class TooLarge(ShardmillError):
    code = "too_large"
    status = 413


class UnsupportedMediaType(ShardmillError):
    code = "unsupported_media_type"
    status = 415


class RangeNotSatisfiable(ShardmillError):
    code = "range_not_satisfiable"
    status = 416


class ExpectationFailed(ShardmillError):
    code = "expectation_failed"
    status = 417


class TransformFailed(ShardmillError):
    code = "transform_failed"
    status = 422


class BadShard(TransformFailed):
    code = "bad_shard"


class SampleOutOfRange(TransformFailed):
    code = "sample_out_of_range"


class EnvironmentUnfit(TransformFailed):
    code = "environment_unfit"


class ServerError(ShardmillError):
    code = "internal"
    status = 500


class CorruptObject(ServerError):
    code = "corrupt_object"


class BackendUnavailable(ShardmillError, ConnectionError):
    code = "backend_unavailable"
    status = 502
    retryable = True


class BackendBusy(BackendUnavailable):
    code = "backend_busy"
    status = 503


class BackendTimeout(BackendUnavailable, TimeoutError):
    code = "backend_timeout"
    status = 504


class Busy(ShardmillError):
    code = "busy"
    status = 503
    retryable = True


class InsufficientStorage(ShardmillError, OSError):
    code = "insufficient_storage"
    status = 507


def error_types() -> dict[str, type[ShardmillError]]:
    """Every error by its code, as documented and as raised again by the SDK."""

    def walk(parent: type[ShardmillError]) -> Iterator[type[ShardmillError]]:
        for child in parent.__subclasses__():
            yield child
            yield from walk(child)

    return {error.code: error for error in reversed(list(walk(ShardmillError))) if "code" in vars(error)}


def error_from_wire(
    code: str,
    message: str,
    *,
    status: int,
    traceback: str | None = None,
    request_id: str | None = None,
    retry_after: int | None = None,
) -> ShardmillError:
    """The error a node meant, raised again on the client; an unknown code falls back to the status."""
    types = error_types()
    found = types.get(code)
    if found is None:
        heads = (error for error in types.values() if error.status == status and _parent(error).status != status)
        found = next(heads, ServerError)
    return found(message, traceback=traceback, request_id=request_id, retry_after=retry_after)


def _parent(error: type[ShardmillError]) -> type[ShardmillError]:
    """The class above it in the tree."""
    parent = error.__bases__[0]
    assert issubclass(parent, ShardmillError)
    return parent
