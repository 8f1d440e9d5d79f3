"""`python one_shot.py FILE.py:FUNCTION SHARD`: the transformed shard, to standard output."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks.peers.shards import transformed
from benchmarks.raw import load

with open(sys.argv[2], "rb") as stream:
    for piece in transformed(stream, load(sys.argv[1])):
        sys.stdout.buffer.write(piece)
