"""Programs that people run over files, run by the node."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from tests.etl.support import command_request, open_engine, read, register_request

PROGRAMS = {
    "gzip": ["gzip", "-nc"],
    "ffmpeg": ["ffmpeg", "-v", "error", "-i", "-", "-vf", "scale=64:-1", "-bitexact", "-f", "image2pipe", "-"],
    "ffmpeg by path": ["ffmpeg", "-v", "error", "-i", "{path}", "-bitexact", "-c:v", "png", "-f", "image2pipe", "-"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_real_program_gives_for_a_real_picture_what_it_gives_at_home(
    tmp_path: Path, picture: Path, name: str
) -> None:
    argv = PROGRAMS[name]
    at_home = [item.replace("{path}", str(picture)) for item in argv]
    expected = subprocess.run(at_home, input=picture.read_bytes(), capture_output=True, check=True).stdout

    async def story() -> None:
        async with open_engine(tmp_path / "data") as engine:
            version = await register_request(engine, command_request(argv), probe=picture)
            assert await read(engine, version, picture) == expected
            assert version.info.probe is not None
            assert version.info.probe.deterministic

    asyncio.run(asyncio.wait_for(story(), 60))
