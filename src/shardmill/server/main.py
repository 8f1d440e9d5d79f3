"""A node as a process: open its parts, listen, say so, and on a signal finish what is going on.

The socket is bound first, so that a port in use is known before anything else is touched.
"""

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor

from shardmill.config import Config, ServerSettings, is_loopback
from shardmill.core.errors import ShardmillError
from shardmill.jobs.registry import Jobs
from shardmill.node.node import Node
from shardmill.server.app import METHODS, App
from shardmill.server.connections import Listener
from shardmill.server.heap import share_arenas
from shardmill.server.limits import take_all_descriptors
from shardmill.telemetry import logs

logger = logging.getLogger(__name__)

SEND_THREADS = 16  # answers that may be in a sendfile call at once
_BACKLOG = 1024


def serve(config: Config) -> int:
    """Run a node until SIGTERM, SIGINT or SIGHUP; returns the exit status.

    Recovery: none here; whatever was acknowledged is on disk when the process ends, however it ends.
    """
    logs.set_up(config.server.log_level)
    share_arenas()
    take_all_descriptors()
    try:
        sock = _bind(config.server)
        context = _tls(config.server)
        with sock:
            return asyncio.run(_run(config, sock, context))
    except (ShardmillError, _CannotStart) as error:
        print(f"shardmill: {error}", file=sys.stderr, flush=True)
        return 1


class _CannotStart(Exception):
    """Why the node cannot listen, and the way out."""


async def _run(config: Config, sock: socket.socket, context: ssl.SSLContext | None) -> int:
    loop = asyncio.get_running_loop()
    ending = _Ending(loop)
    with ThreadPoolExecutor(SEND_THREADS, thread_name_prefix="send") as threads:
        async with Node.open(config) as node, Jobs.open(node) as jobs:
            app = App(node, jobs, threads)
            async with Listener(
                app.handle, config.server, methods=METHODS, on_refused=app.refused, desk=app.desk
            ) as listener:
                server = await loop.create_server(
                    listener.accept,
                    sock=sock,
                    backlog=_BACKLOG,
                    ssl=context,
                    # A handshake is the head of a connection, and its end waits for the reader.
                    ssl_handshake_timeout=config.server.header_timeout if context else None,
                    ssl_shutdown_timeout=config.server.send_timeout if context else None,
                )
                _announce(node, sock, tls=context is not None)
                await ending.begun.wait()
                app.begin_draining()
                # Workers are for the answers that are going on.
                await jobs.stop()
                await _drain(server, listener, config.server.drain, ending.hurried)
    return 0


class _Ending:
    """What signals ask for: to end, and with a second one not to wait for readers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.begun = asyncio.Event()
        self.hurried = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Under nohup a terminal that goes away is nothing to the node.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.begun.is_set():
            self.hurried.set()
        self.begun.set()


async def _drain(server: asyncio.Server, listener: Listener, seconds: float, hurried: asyncio.Event) -> None:
    """Finish what is going on for at most `seconds`, or until somebody is in a hurry, then cut it."""
    logger.info("draining: %d requests in work, at most %g s; a second signal ends it now", listener.serving, seconds)
    waiting = [asyncio.create_task(listener.wait_idle(seconds)), asyncio.create_task(hurried.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    server.close()
    if listener.serving:
        logger.warning("%d requests were not done and are cut", listener.serving)
    await listener.cut()


def _bind(settings: ServerSettings) -> socket.socket:
    host, port = settings.address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # Of each that is accepted, too: the loop sets it only where a socket names its protocol. Without it the end of
        # an answer waits until the peer acknowledges what was before, which it does after 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except OSError as error:
        # The error's own text tells the address once more; only that of a name that is not found has no number.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise _CannotStart(
            f"cannot listen on {settings.listen}: {reason}; take another port with --listen {host}:PORT "
            "(port 0 takes a free one)"
        ) from None


def _tls(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise _CannotStart(f"--tls-cert {settings.tls_cert} and --tls-key do not load: {error}") from None
    return context


def _announce(node: Node, sock: socket.socket, *, tls: bool) -> None:
    """Say where the node is, what it serves, and what to try next."""
    host, port = sock.getsockname()[:2]
    shown = "localhost" if is_loopback(host) else f"[{host}]" if ":" in host else host
    url = f"{'https' if tls else 'http'}://{shown}:{port}"
    lines = [f"shardmill is ready at {url}"]
    buckets = node.config.buckets
    for bucket in buckets:
        kind, _, path = bucket.backing.partition(":")
        place = bucket.backing if bucket.is_remote else path
        where = f"{place}, {'writable' if bucket.writable else 'read-only'}" if place else kind
        lines.append(f"  {bucket.uri}  ({where})")
    if not buckets:
        lines.append("  no buckets are configured; make one with: shardmill mb ais://NAME")
    missing = [name for name, is_active in node.transforms.isolation().items() if not is_active]
    isolation = f"all layers but {', '.join(missing)}; see shardmill doctor" if missing else "all layers"
    lines.append(f"  data: {node.config.server.data}; samples at once: {node.config.transforms.worker_count}")
    lines.append(f"  isolation of transforms: {isolation}")
    if not is_loopback(host):
        lines.append("  WARNING: no credentials are asked for; who reaches this address can run code here")
    endpoint = "" if port == 51080 and not tls else f" --endpoint {url}"
    first = buckets[0].uri if buckets else ""
    lines.append(f"try: shardmill{endpoint} ls {first}".rstrip())
    print("\n".join(lines), file=sys.stderr, flush=True)
