"""torch in workers: one seed whatever the worker, one thread, tensors as WebDataset encodes them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from webdataset import writer

from shardmill.core.api import TransformInfo, TransformRequest
from tests.etl.over_http import Served, serve
from tests.etl.support import members, request_for, write_shard
from tests.torch.nodes import SERVER_PYTHON, SOURCES, TORCH_PYTHON

pytestmark = pytest.mark.timeout(300)

CROP = """
    import numpy as np
    import torch
    from torchvision import transforms

    train = transforms.Compose(
        [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )

    def transform(sample):
        sample["npy"] = train(sample.pop("jpg")).permute(1, 2, 0).numpy().astype("float32")
        sample["json"] = [torch.rand(1).item(), float(np.random.rand()), torch.get_num_threads()]
        return sample
"""
TENSORS = """
    import torch

    def transform(sample):
        value = torch.arange(6, dtype=torch.float32).reshape(2, 3)
        return {"pth": {"a": value, "b": [1, 2]}, "npy": value.numpy(), "cls": torch.tensor(7)}
"""


def register(served: Served, source: str, name: str) -> TransformInfo:
    request: TransformRequest = request_for(source, name=name)
    code = msgspec.structs.replace(request.code, modules=["numpy", "torch", "torchvision"])
    body = msgspec.json.encode(msgspec.structs.replace(request, code=code, environment="torch"))
    answer = served.ask("POST", "/api/transforms", body)
    assert answer.status in (200, 201), answer.body
    return msgspec.json.decode(answer.body, type=TransformInfo)


def test_torchvision_draws_the_same_over_workers_and_restarts(shards: Path, tmp_path: Path) -> None:
    file = "imagenet-train-000000.tar"
    digests, other = set(), b""
    for workers in ("1", "2"):
        flags = ("--workers", workers, "--env", f"torch={TORCH_PYTHON}")
        with serve(shards, *flags, data=tmp_path / "data", environ=SOURCES, python=SERVER_PYTHON) as served:
            info = register(served, CROP, "crop")
            answer = served.get(info, file, ",seed=1,epoch=1,count=24")
            assert answer.status == 200, answer.body
            digests.add(hashlib.sha256(answer.body).hexdigest())
            other = served.get(info, file, ",seed=1,epoch=2,count=24").body
    assert len(digests) == 1
    assert hashlib.sha256(other).hexdigest() not in digests
    drawn = [json.loads(data) for name, data in members(other).items() if name.endswith(".json")]
    assert len({tuple(values[:2]) for values in drawn}) == 24
    assert {values[2] for values in drawn} == {1}


def test_tensors_are_encoded_as_webdataset_encodes_them(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [{"txt": b"x"}])
    flags = ("--workers", "1", "--env", f"torch={TORCH_PYTHON}")
    with serve(tmp_path, *flags, environ=SOURCES, python=SERVER_PYTHON) as served:
        answer = served.get(register(served, TENSORS, "tensors"), "s.tar")
    assert answer.status == 200, answer.body
    found = members(answer.body)
    value = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    loaded = torch.load(io.BytesIO(found["0000.pth"]), weights_only=True)
    assert torch.equal(loaded["a"], value)
    assert loaded["b"] == [1, 2]
    assert found["0000.npy"] == writer.encode_based_on_extension1(value.numpy(), "npy", writer.default_handlers)
    assert np.array_equal(np.load(io.BytesIO(found["0000.npy"])), value.numpy())
    assert found["0000.cls"] == b"7"
    assert tarfile.is_tarfile(io.BytesIO(answer.body))
