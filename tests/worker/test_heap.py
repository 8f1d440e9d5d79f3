"""What one sample gives back serves the next: the kernel is not asked for memory again."""

import subprocess
import sys

TRIES = 200
SCRIPT = f"""
import resource
from shardmill.worker.heap import keep_what_is_freed
assert keep_what_is_freed()
block = bytes(3 << 20)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TRIES}):
    one, other = b"a" * (2 << 20), b"b" * (1 << 20)
    del one, other
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_blocks_are_used_again() -> None:
    # Three megabytes are 768 pages; a page fault each and try, if they went back to the kernel in between.
    said = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    assert int(said) < 768 * 2
