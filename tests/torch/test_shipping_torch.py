"""Functions over torch's and torchvision's objects: one form in every process, and they work where they arrive."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from shardmill.client.shipping import CannotShip, ship
from tests.client.processes import capturing, come_back, form_of_value, ship_from

SCRIPT = """
import torch
from torch import nn
from torchvision import transforms
import torch.nn.functional as F

torch.manual_seed(3)
MEAN = torch.tensor([0.5, 0.25])
LAYER = nn.Linear(2, 3)
CROP = transforms.Compose([transforms.RandomResizedCrop(24), transforms.ToTensor(), transforms.Normalize([0.4] * 3, [0.2] * 3)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return F.relu(self.layers(x)).sum() + self.shift.sum()


NET = Net().eval()


@torch.no_grad()
def augment(sample):
    from torchvision.transforms import functional
    picture = functional.hflip(torch.ones(1, 4, 4) * sample)
    return [MEAN.tolist(), LAYER(MEAN).tolist(), float(NET(picture[None])), len(CROP.transforms), str(CROP.transforms[0])]
"""


@pytest.mark.timeout(300)  # each of the processes imports torch
def test_processes_give_one_form_and_a_changed_weight_another(tmp_path: Path) -> None:
    commented = SCRIPT.replace("@torch.no_grad", "# Shifts the lines below.\n\n\n@torch.no_grad")
    shipped = [
        ship_from(tmp_path / "first", SCRIPT, seed=0),
        ship_from(tmp_path / "second", SCRIPT, seed=1),
        ship_from(tmp_path / "commented", commented, seed=2),
    ]
    assert len({client.form for client in shipped}) == 1
    assert len({client.fingerprint for client in shipped}) == 1
    assert shipped[0].modules == ["torch", "torchvision"]
    other = ship_from(tmp_path / "other", SCRIPT.replace("manual_seed(3)", "manual_seed(4)"))
    assert other.form != shipped[0].form
    assert other.fingerprint != shipped[0].fingerprint
    result = shipped[2].call(2)
    assert result[0] == [0.5, 0.25]
    assert result[3:] == [
        3,
        "RandomResizedCrop(size=(24, 24), scale=(0.08, 1.0), ratio=(0.75, 1.3333), interpolation=bilinear, antialias=True)",
    ]


PLAIN = torch.arange(6).reshape(2, 3).float()


def tensors() -> dict[str, Any]:
    part = torch.complex(PLAIN, PLAIN + 1)
    return {
        "plain": PLAIN,
        "other values": PLAIN + 1,
        "other shape": PLAIN.reshape(3, 2),
        "transposed": PLAIN.T,
        "slice": PLAIN[:, 1],
        "double": PLAIN.double(),
        "half": PLAIN.half(),
        "bfloat16": PLAIN.bfloat16(),
        "integers": PLAIN.int(),
        "truths": PLAIN > 2,
        "complex": part,
        "conjugated": part.conj(),
        "negated": part.conj().imag,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "with gradient": PLAIN.clone().requires_grad_(),
        "parameter": nn.Parameter(PLAIN),
        "sparse": PLAIN.to_sparse(),
        "image": tv_tensors.Image(torch.zeros(3, 2, 2)),
        "mask": tv_tensors.Mask(torch.zeros(3, 2, 2)),
        "dtype": torch.float16,
        "other dtype": torch.float32,
        "layout": torch.channels_last,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "generator": torch.Generator().manual_seed(1),
    }


def test_tensors_are_told_apart_by_type_shape_and_bytes() -> None:
    values = tensors()
    forms = {name: form_of_value(value) for name, value in values.items()}
    assert len(set(forms.values())) == len(values), sorted(forms.items(), key=lambda item: item[1])
    for name, value in tensors().items():
        assert form_of_value(value) == forms[name], name
    assert form_of_value(torch.cat([PLAIN, PLAIN])[:2]) == forms["plain"]


@pytest.mark.parametrize("what", [name for name in tensors() if name != "generator"])
def test_tensors_come_back(what: str) -> None:
    value = tensors()[what]
    (loaded, _) = come_back(capturing(value))(None)
    torch._utils._validate_loaded_sparse_tensors()  # of what was loaded torch keeps a list, until it loads a file
    assert type(loaded) is type(value)
    if isinstance(value, torch.Tensor):
        assert (loaded.dtype, loaded.shape, loaded.requires_grad) == (value.dtype, value.shape, value.requires_grad)
        assert torch.equal(loaded.detach().to_dense(), value.detach().to_dense())
    else:
        assert loaded == value


def test_modules_are_told_apart_by_class_and_state() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(2, 2)
    forms = {form_of_value(linear)}
    assert form_of_value(copy.deepcopy(linear)) in forms
    loaded = nn.Linear(2, 2)
    loaded.load_state_dict(linear.state_dict())
    assert form_of_value(loaded) in forms
    evaluated = copy.deepcopy(linear).eval()
    for other in (
        nn.Linear(2, 2),
        nn.Bilinear(2, 2, 2),
        evaluated,
        nn.Sequential(linear),
        transforms.ToTensor(),
        v2.ToImage(),
    ):
        forms.add(form_of_value(other))
    assert len(forms) == 7


def test_transforms_are_told_apart_by_their_parameters() -> None:
    def crop(size: int, mean: float) -> Callable[[Any], Any]:
        return capturing(transforms.Compose([transforms.CenterCrop(size), transforms.Normalize([mean], [1.0])]))

    assert ship(crop(224, 0.5)).form == ship(crop(224, 0.5)).form
    assert len({ship(crop(*case)).form for case in ((224, 0.5), (225, 0.5), (224, 0.25))}) == 3
    assert ship(crop(224, 0.5)).modules == ("torchvision",)
    newer = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Lambda(lambda x: x + 1)])
    assert ship(capturing(newer)).modules == ("torch", "torchvision")
    assert torch.equal(come_back(capturing(newer))(None)[0](torch.ones(2)), torch.full((2,), 2.0))


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(CannotShip, match=r"`value` of function `<lambda>` is a meta tensor, .* capture its \.cpu\(\)"):
        ship(capturing(torch.empty(2, device="meta")))
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(CannotShip, match=r"`value\._modules\['0'\]\._parameters\['weight'\]` .* is a meta tensor"):
        ship(capturing(model))


def test_torchs_generator_is_the_workers_own() -> None:
    function = capturing((torch.default_generator, torch.rand))
    plain = ship(function).form
    torch.rand(1)
    assert ship(function).form == plain
    (generator, rand), _ = come_back(function)(None)
    assert generator is torch.default_generator
    assert rand is torch.rand


def test_shipping_plain_functions_does_not_import_torch(tmp_path: Path) -> None:
    script = "import numpy as np\nARRAY = np.zeros(3)\n\n\ndef augment(sample):\n    import torch\n    return ARRAY.sum() + sample\n"
    before = 'import atexit, sys\natexit.register(lambda: "torch" in sys.modules and print("imported", file=open("seen", "w")))\n'
    shipped = ship_from(tmp_path, script, before=before)
    assert shipped.modules == ["numpy", "torch"]
    assert not (tmp_path / "seen").exists()
