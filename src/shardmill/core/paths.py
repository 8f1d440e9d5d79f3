"""URL paths of objects and transformed objects, built by the SDK and parsed by the server.

Everything that decides the bytes stands in the last segment: WebDataset's `cache_dir` names its file by that segment
alone and drops the query.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b
from urllib.parse import quote

from shardmill.core.errors import BadRequest
from shardmill.core.refs import Bucket, ObjectRef, quote_key, unquote_path
from shardmill.core.specs import Spec

MAX_SEGMENT = 243  # bytes, percent-encoded: WebDataset appends ".temp" + pid within the file system's 255


@dataclass(frozen=True, slots=True)
class TransformedRef:
    """A transformed object's name: its source and the spec."""

    ref: ObjectRef
    spec: Spec


def folder_key(ref: ObjectRef, digits: int = 4) -> str:
    """The `k` of a spec: tells equal file names of two folders apart in a client's cache directory."""
    dirs = ref.key.rpartition("/")[0]
    text = f"{ref.bucket.provider}/{ref.bucket.name}/{dirs}"
    return blake2b(text.encode(), digest_size=8).hexdigest()[:digits]


def object_path(ref: ObjectRef) -> str:
    """`/o/{provider}/{bucket}/{key}`, percent-encoded."""
    return f"/o/{ref.bucket.provider}/{ref.bucket.name}/{quote_key(ref.key)}"


def member_path(ref: ObjectRef, name: str) -> str:
    """`/o/{provider}/{bucket}/{key}?member={name}`, percent-encoded; bytes that are no UTF-8 are surrogates in `name`.

    Raises:
        BadRequest: The name is empty.
    """
    if not name:
        raise BadRequest(f"a member of {ref} without a name")
    return f"{object_path(ref)}?member={quote(name, safe='/-._~', errors='surrogateescape')}"


def transformed_path(ref: ObjectRef, spec: Spec) -> str:
    """`/t/{provider}/{bucket}/[{dirs}/]{spec}~{file}` with `k` filled in.

    Raises:
        BadRequest: A bare name (no digest), a key that ends in a slash, or a last segment over 243 bytes.
    """
    if spec.digest is None:
        raise BadRequest(f"transform {spec.name!r} names no version; use the uuid that registration returned")
    path = render_transformed(ref, replace(spec, k=folder_key(ref)))
    segment = path.rpartition("/")[2]
    if len(segment) > MAX_SEGMENT:
        raise BadRequest(
            f"the last segment of the URL for {ref} has {len(segment)} bytes, at most {MAX_SEGMENT} are allowed; "
            "shorten the file's or the transform's name"
        )
    return path


def render_transformed(ref: ObjectRef, spec: Spec) -> str:
    """The path of a spec over an object as it is, without checks on its length."""
    dirs, slash, file = ref.key.rpartition("/")
    if not file:
        raise BadRequest(f"{ref} ends in '/', so it has no file name to transform")
    return f"/t/{ref.bucket.provider}/{ref.bucket.name}/{quote_key(dirs)}{slash}{spec}~{quote_key(file)}"


def parse_object_path(raw_path: str) -> ObjectRef:
    """Parse a raw (percent-encoded) `/o/...` path, without normalising anything.

    Raises:
        BadRequest: Not of that form.
    """
    bucket, key = _split(raw_path)
    return ObjectRef.of(bucket, unquote_path(key))


def parse_transformed_path(raw_path: str) -> TransformedRef:
    """Parse a raw `/t/...` path; the last segment is split at its first raw `~`.

    Raises:
        BadRequest: Not of that form, a wrong `k`, or a segment over 243 bytes.
    """
    bucket, rest = _split(raw_path)
    dirs, slash, segment = rest.rpartition("/")
    spec_text, tilde, file = segment.partition("~")
    if not tilde:
        raise BadRequest("the last segment of a /t path is SPEC~FILE; there is no '~' in it")
    if len(segment) > MAX_SEGMENT:
        raise BadRequest(f"the last path segment has {len(segment)} bytes; at most {MAX_SEGMENT} are allowed")
    if not file:
        raise BadRequest("the last segment of a /t path is SPEC~FILE; the file is empty")
    # Percent-encoded spec characters have one spelling too: raw.
    if "%" in spec_text:
        decoded = unquote_path(spec_text)
        raise BadRequest(f"transform {spec_text!r} is not spelled canonically; write {decoded!r}")
    ref = ObjectRef.of(bucket, unquote_path(dirs + slash + file))
    spec = Spec.parse(spec_text)
    if "%2f" in file.lower():
        # The last segment is the name that a client keeps the object under.
        raise BadRequest(f"the file {file!r} of a /t path has an encoded '/'; write {render_transformed(ref, spec)}")
    if spec.k is not None and folder_key(ref, len(spec.k)) != spec.k:
        raise BadRequest(f"k={spec.k} does not belong to {ref}; it is {folder_key(ref, len(spec.k))}")
    return TransformedRef(ref, spec)


def _split(raw_path: str) -> tuple[Bucket, str]:
    """Bucket and raw key of `/face/provider/bucket/key`."""
    parts = raw_path.split("/", 4)
    if len(parts) < 5 or not parts[4]:
        raise BadRequest(f"the path is not of the form /{parts[1] if len(parts) > 1 else 'o'}/provider/bucket/key")
    return Bucket.of(unquote_path(parts[2]), unquote_path(parts[3])), parts[4]
