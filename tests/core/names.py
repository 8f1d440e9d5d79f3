"""Strategies for names: buckets, keys, specs."""

from hypothesis import strategies as st

from shardmill.core.errors import BadRequest
from shardmill.core.refs import PROVIDERS, Bucket, ObjectRef, check_key
from shardmill.core.specs import MAX_INTEGER, ErrorPolicy, Spec

_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyz0123456789"
_HEX = "0123456789abcdef"


def _is_bucket(name: str) -> bool:
    try:
        Bucket.of("ais", name)
    except BadRequest:
        return False
    return True


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except BadRequest:
        return False
    return True


bucket_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", fullmatch=True).filter(_is_bucket)
buckets = st.builds(Bucket.of, st.sampled_from(PROVIDERS), bucket_names)
keys = st.one_of(
    st.text(alphabet="ab/.~%{}$;:@=, +é", min_size=1, max_size=30),
    st.text(min_size=1, max_size=60),
).filter(_is_key)
refs = st.builds(ObjectRef, buckets, keys)

integers = st.integers(0, MAX_INTEGER)
digests = st.text(alphabet=_HEX, min_size=12, max_size=64)
policies = st.one_of(
    st.just(ErrorPolicy()),
    st.integers(1, 10**9).map(lambda part: ErrorPolicy(part / 10**9)),
)


@st.composite
def specs(draw: st.DrawFn, *, versioned: bool = False) -> Spec:
    """Every spec that can be written."""
    seed = draw(st.none() | integers)
    return Spec(
        name=draw(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)),
        digest=draw(digests if versioned else st.none() | digests),
        seed=seed,
        epoch=0 if seed is None else draw(integers),
        errors=draw(policies),
        start=draw(integers),
        count=draw(st.none() | st.integers(1, MAX_INTEGER)),
        args=draw(st.none() | st.text(alphabet=_HEX, min_size=12, max_size=12)),
        k=draw(st.none() | st.text(alphabet=_HEX, min_size=4, max_size=8)),
    )
