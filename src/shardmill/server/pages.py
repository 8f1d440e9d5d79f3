"""`/`: what this is and where to go, for a person with a browser."""

from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from aiohttp import web

from shardmill import __version__
from shardmill.jobs.registry import Jobs
from shardmill.node.node import Node
from shardmill.server.calls import Call

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>shardmill</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{{color-scheme:light dark}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:3rem auto;padding:0 1rem}}
code{{background:color-mix(in srgb,currentColor 8%,transparent);padding:.1rem .35rem;border-radius:3px}}
h1 small{{font-weight:normal;opacity:.6}}h2{{margin:2rem 0 .5rem;font-size:1.2rem}}
table{{border-collapse:collapse;width:100%}}
th{{text-align:left;font-weight:normal;opacity:.6;white-space:nowrap}}
th,td{{padding:.25rem 1.5rem .25rem 0;vertical-align:top}}td{{overflow-wrap:anywhere}}
td:first-child{{white-space:nowrap}}
tr+tr td{{border-top:1px solid color-mix(in srgb,currentColor 12%,transparent)}}
</style></head>
<body><h1>shardmill <small>{version}</small></h1>
<p>An object store for sharded data in which a transformed shard is a URL.</p>
<h2>Buckets</h2>{buckets}
<h2>Transforms</h2>{transforms}
<h2>Jobs</h2>{jobs}
<h2>Elsewhere</h2>
<p><a href="/api/openapi.json">API</a> · <a href="/api/config">configuration</a> · <a href="/metrics">metrics</a></p>
</body></html>
"""


_JOBS = 20  # the newest


async def index(node: Node, jobs: Jobs, call: Call) -> web.StreamResponse:
    """Buckets, transforms and jobs as a page without scripts."""
    buckets = [
        (
            _link(f"/api/objects?bucket={quote(info.uri, safe=':/')}&delimiter=/", info.uri),
            escape(info.backing),
            "writable" if info.writable else "read-only",
        )
        for info in node.objects.buckets(call.principal)
    ]
    transforms = [
        (
            _link(f"/api/transforms/{quote(info.uuid, safe='@,=')}", info.uuid),
            escape(info.label),
            escape(info.environment),
        )
        for info in node.transforms.list(call.principal)
    ]
    newest = [
        (
            _link(f"/api/jobs/{info.id}", info.id),
            escape(info.state),
            escape(f"{info.done} of {info.total}" + (f", {info.failed} failed" if info.failed else "")),
            escape(info.request.label.replace("->", "→")),
        )
        for info in jobs.list(call.principal)[:_JOBS]
    ]
    page = _PAGE.format(
        version=__version__,
        buckets=_table(("bucket", "backing", "access"), buckets, "shardmill mb ais://NAME"),
        transforms=_table(
            ("version", "from", "environment"), transforms, "shardmill transform add FILE.py:FUNC --name NAME"
        ),
        jobs=_table(("job", "state", "objects", "from and to"), newest, "shardmill cp --transform NAME SOURCE TARGET"),
    )
    headers = {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        "X-Content-Type-Options": "nosniff",
    }
    return web.Response(text=page, content_type="text/html", headers=headers)


def _link(target: str, text: str) -> str:
    return f'<a href="{escape(target)}">{escape(text)}</a>'


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], command: str) -> str:
    """Rows of HTML under their headings; without any, the command that makes the first."""
    if not rows:
        return f"<p>None yet: <code>{escape(command)}</code></p>"
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
