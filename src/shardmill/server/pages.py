"""`/`: what this is and where to go, for a person with a browser."""

from html import escape

from aiohttp import web

from shardmill import __version__
from shardmill.node.node import Node
from shardmill.server.calls import Call

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>shardmill</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#222}}
code{{background:#f2f2f2;padding:.1rem .3rem;border-radius:3px}}td{{padding:.1rem 1.5rem .1rem 0}}</style></head>
<body><h1>shardmill {version}</h1>
<p>An object store for sharded data in which a transformed shard is a URL.</p>
<h2>Buckets</h2><table>{buckets}</table>
<h2>Transforms</h2><table>{transforms}</table>
<h2>Elsewhere</h2>
<p><a href="/api/openapi.json">API</a> · <a href="/api/config">configuration</a> · <a href="/metrics">metrics</a></p>
</body></html>
"""


async def index(node: Node, call: Call) -> web.StreamResponse:
    """Buckets and transforms as a page without scripts."""
    buckets = "".join(
        f'<tr><td><a href="/api/objects?bucket={escape(info.uri)}&amp;delimiter=/">{escape(info.uri)}</a></td>'
        f"<td>{escape(info.backing)}</td><td>{'writable' if info.writable else 'read-only'}</td></tr>"
        for info in node.objects.buckets(call.principal)
    )
    transforms = "".join(
        f'<tr><td><a href="/api/transforms/{escape(info.name)}@{info.digest[:12]}">'
        f"{escape(info.name)}@{info.digest[:12]}</a></td>"
        f"<td>{escape(info.label)}</td><td>{escape(info.environment)}</td></tr>"
        for info in node.transforms.list(call.principal)
    )
    none = "<tr><td>none yet</td></tr>"
    page = _PAGE.format(version=__version__, buckets=buckets or none, transforms=transforms or none)
    headers = {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        "X-Content-Type-Options": "nosniff",
    }
    return web.Response(text=page, content_type="text/html", headers=headers)
