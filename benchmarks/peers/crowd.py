"""`crowd.py PORT COUNT PATH`: keeps connections that have had one answer each, until its input ends."""

import resource
import socket
import sys


def main() -> None:
    port, count, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    peers = []
    for _ in range(count):
        peer = socket.create_connection(("127.0.0.1", port))
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if b" 200 " not in peer.recv(65536):
            raise SystemExit("no answer")
        peers.append(peer)
    print("ready", flush=True)
    sys.stdin.read()


main()
