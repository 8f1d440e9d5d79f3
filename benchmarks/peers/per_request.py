"""`python per_request.py FILE.py:FUNCTION DIRECTORY`: a server that starts one Python process for each request.

How a transform was run before there were servers for them; it prints `ready PORT`.
"""

import http.server
import shutil
import subprocess
import sys
from pathlib import Path

TARGET, DIRECTORY = sys.argv[1], Path(sys.argv[2])


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        shard = DIRECTORY / Path(self.path).name
        command = [sys.executable, str(Path(__file__).parent / "one_shot.py"), TARGET, str(shard)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            self.send_response(200)
            self.end_headers()
            shutil.copyfileobj(process.stdout, self.wfile, 1 << 20)

    def log_message(self, *_: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("ready", server.server_address[1], flush=True)
server.serve_forever()
