"""nginx to compare with: the one that is installed, with its settings for small answers and, unless said, one worker.

`tcp_nopush` stays off, which would hold small answers back; files are kept open; there is no access log.
"""

import contextlib
import grp
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import children_of

_CONF = """user {user} {group};
worker_processes {workers};
worker_rlimit_nofile {files};
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  log_not_found off;
  sendfile on;
  tcp_nopush off;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  open_file_cache max=4096;
  server {{ listen 127.0.0.1:{port}; root {root}; {more} }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """One that runs."""

    port: int
    master: int
    """Process id of the one whose children answer."""
    worker: int
    """Process id of the first that answers."""


def installed() -> str | None:
    """The program, if there is one."""
    return shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")


@contextlib.contextmanager
def running(
    program: str | Path, directory: Path, root: Path, *, more: str = "", workers: int = 1, connections: int = 512
) -> Iterator[Nginx]:
    """Serve `root`.

    Args:
        program: Of nginx.
        directory: Scratch.
        root: What is served.
        more: Directives of its server.
        workers: Processes that answer.
        connections: That each of them takes.
    """
    directory = directory / f"nginx-{workers}"
    directory.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    configuration = directory / "nginx.conf"
    # As whoever runs this: nginx would have another user read the scratch directory, who may not.
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    configuration.write_text(
        _CONF.format(
            user=user,
            group=group,
            directory=directory,
            port=port,
            root=root,
            more=more,
            workers=workers,
            connections=connections,
            files=connections + 4200,  # those that it keeps open, too
        )
    )
    process = subprocess.Popen([program, "-c", configuration, "-e", directory / "error.log"])
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.01)
        yield Nginx(port, process.pid, children_of(process.pid)[0])
    finally:
        process.terminate()
        process.wait()
