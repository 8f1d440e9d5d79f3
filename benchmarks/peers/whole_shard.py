"""`python whole_shard.py FILE.py:FUNCTION DIRECTORY PROCESSES`: warm processes, each of which makes a whole shard.

A request goes to a process that is free, which transforms the shard from beginning to end and then answers; it prints
`ready PORT`.
"""

import http.server
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.peers.shards import transformed
from benchmarks.raw import load

FUNCTION, DIRECTORY = load(sys.argv[1]), Path(sys.argv[2])


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with open(DIRECTORY / Path(self.path).name, "rb") as stream:
            body = b"".join(transformed(stream, FUNCTION))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("ready", server.server_address[1], flush=True)
for _ in range(int(sys.argv[3]) - 1):
    if os.fork() == 0:
        break
server.serve_forever()
