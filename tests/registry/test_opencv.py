"""A real distribution from a real package index: `make test-packages`, apart from the other suites, which need none."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardmill import Client, WDTransform
from shardmill.core.errors import EnvironmentUnfit
from shardmill.testing.node import running_node

SHARD = "imagenet-val-000000.tar"


@pytest.fixture(scope="module")
def client(shards: Path) -> Iterator[Client]:
    with running_node("--bucket", f"gs://imagenet=dir:{shards}", "--workers", "2") as node:
        with Client(node.endpoint) as client:
            yield client


def shrink(sample: dict[str, Any]) -> dict[str, Any]:
    import cv2  # type: ignore[import-not-found]  # of the node's environment only

    picture = np.asarray(sample.pop("jpg").convert("RGB"))
    sample["npy"] = cv2.resize(picture, (32, 16), interpolation=cv2.INTER_AREA)
    found = []
    for name in ("aiohttp", "lmdb", "msgspec", "obstore", "uv", "cv2"):
        try:
            __import__(name)
        except ImportError:
            continue
        found.append(name)
    sample["txt"] = " ".join(found)
    return sample


def test_opencv_on_a_server_without_it(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    etl = WDTransform(client, shrink, verbose=True, packages=["opencv-python-headless"])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "resolving opencv-python-headless"
    assert any(line.startswith("downloading opencv-python-headless (") for line in said)
    assert any(line.startswith("downloaded opencv-python-headless (") for line in said)
    assert any(line.startswith("built environment packages-") for line in said)
    assert any(name.startswith("opencv-python-headless==") for name in etl.info.locked)
    data = client.object(f"gs://imagenet/{SHARD}").get(etl.uuid).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {member.name: archive.extractfile(member) for member in archive}
    texts = {file.read() for name, file in found.items() if file is not None and name.endswith(".txt")}
    assert texts == {b"cv2"}
    arrays = [np.load(io.BytesIO(file.read())) for name, file in found.items() if file and name.endswith(".npy")]
    assert arrays
    assert {(array.shape, array.dtype.name) for array in arrays} == {((16, 32, 3), "uint8")}
    # The second time it is there.
    WDTransform(client, shrink, verbose=True, packages=["opencv-python-headless"])
    assert "resolving" not in capsys.readouterr().err


def test_a_name_that_the_index_does_not_have(client: Client) -> None:
    with pytest.raises(EnvironmentUnfit, match=r"(?s)cannot be installed .* not found in the package registry"):
        WDTransform(client, shrink, packages=["opencv-python-headless", "shardmill-no-such-distribution"])
