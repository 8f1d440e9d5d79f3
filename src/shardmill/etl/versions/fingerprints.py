"""What code does, told from its bytes alone: the node's own part of a version's identity.

Equal fingerprints are equal programs, whoever made the bytes and whatever they claim to be. Equal functions that travel
as other bytes merely have two, so what is in doubt is known by its very bytes.
"""

import ast
import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any

from shardmill.core.api import Code
from shardmill.etl.versions.pickles import NotFollowed, follow, is_plain_text, writer

MAX_SOURCE = 1 << 18  # characters of a file that is parsed here, some 200 bytes of memory each
_MAX_DEPTH = 200  # of nested statements and expressions; Python's own limits depend on who calls


def fingerprint(code: Code) -> str:
    """64 hex digits over what a version's code does."""
    if code.encoding == "pipeline":
        # Made by the node, of the digests of its parts.
        return code.form
    try:
        if code.encoding == "cloudpickle":
            return follow(code.payload)
        if code.encoding == "source":
            return _of_source(code.payload)
    except (NotFollowed, ValueError, LookupError, AttributeError, TypeError, SyntaxError, RecursionError, MemoryError):
        # Nothing that a client of ours writes, or nothing that this Python knows.
        pass
    return hashlib.sha256(f"bytes of {code.encoding} ".encode() + code.payload).hexdigest()


def _of_source(payload: bytes) -> str:
    """Of a file what is compiled: its tree, without comments and layout.

    Not its tokens: those of the standard library's tokenizer are not in every case those that are compiled.
    """
    document = json.loads(payload)
    source, filename = document["source"], document["filename"]
    if not is_plain_text(filename) or len(source) > MAX_SOURCE:
        raise NotFollowed("a file that does not travel like this")
    digest = hashlib.sha256(b"source")
    put = writer(digest.update)
    # The name is no matter, unless the code may look at it.
    put("file", json.dumps([document["function"], filename if "__file__" in source else None]).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the user's code; they are for who compiles it
        tree = ast.parse(source)
    _write(tree, put, 0)
    return digest.hexdigest()


def _write(node: Any, put: Callable[[str, bytes], None], depth: int, *, is_format: bool = False) -> None:
    """A tree, the same from every Python that can read the source: newer ones know more fields, which are empty."""
    if depth > _MAX_DEPTH:
        raise NotFollowed("deeply nested")
    if isinstance(node, ast.Constant):
        put(type(node.value).__name__, repr((node.value, node.kind)).encode("utf-8", "surrogatepass"))
    elif isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        put(type(node).__name__, ",".join(name for name, _ in fields).encode())
        for _, value in fields:
            _write(value, put, depth + 1, is_format=isinstance(node, ast.JoinedStr))
    elif isinstance(node, list):
        # Python 3.12 ends some formats with nothing.
        items = [item for item in node if not (isinstance(item, ast.Constant) and item.value == "" and is_format)]
        put("list", b"%d" % len(items))
        for item in items:
            _write(item, put, depth)
    else:
        put(type(node).__name__, repr(node).encode("utf-8", "surrogatepass"))
