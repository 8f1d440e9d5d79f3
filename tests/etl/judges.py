"""Readers of tar streams, asked the one thing that matters here: would they take these bytes for a whole shard?"""

import io
import subprocess
import tarfile


def tarfile_is_content(data: bytes) -> bool:
    """Python's reader, as a stream and with every payload read."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    file.read()
    except tarfile.TarError:
        return False
    return True


def gnu_tar_is_content(data: bytes) -> bool:
    """GNU tar from a pipe, by its exit status."""
    return subprocess.run(["tar", "-xOf", "-"], input=data, capture_output=True).returncode == 0


def count_samples(data: bytes) -> int:
    """Different keys of a whole archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return len({member.name.partition(".")[0] for member in archive})
