"""Arrays and tensors as tokens of a normal form: type, shape and bytes.

How they pickle differs between versions of their libraries and between processes. Neither library is imported here.
"""

import sys
from typing import Any

from shardmill.client.refusals import Place, refuse

Token = tuple[str, bytes]


def element_type(value: Any) -> Token | None:
    """The token of a data type or a layout; there may be several equal ones, so they are never numbered."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, numpy.dtype):
        return "dtype", repr((type(value).__name__, numpy.lib.format.dtype_to_descr(value))).encode()
    if torch is not None and isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return "torch", str(value).encode()
    return None


def array(value: Any) -> list[Token] | None:
    """The tokens of an array or a numpy scalar; None for anything else, and where Python objects are the elements."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.generic)) or value.dtype.hasobject:
        return None
    what = "array" if type(value) is numpy.ndarray else "scalar"
    about = repr((numpy.lib.format.dtype_to_descr(value.dtype), value.shape))
    return [(what, about.encode()), ("bytes", value.tobytes())]


def tensor(value: Any, place: Place) -> list[Token] | None:
    """The tokens of a tensor, whose class and attributes are not among them; None for anything else.

    Raises:
        CannotShip: It lies on another device.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    if value.device.type != "cpu":
        device = "CUDA" if value.device.type == "cuda" else value.device.type
        raise refuse(place, f"a {device} tensor", "capture its .cpu()")
    about = [str(value.dtype), tuple(value.shape), value.requires_grad, str(value.layout)]
    dense = value.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.is_quantized:
        about += [str(dense.qscheme()), dense.dequantize().tolist()]
        dense = dense.int_repr()
    plain = dense.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous().reshape(-1)
    return [("tensor", repr(about).encode()), ("bytes", plain.view(torch.uint8).numpy().tobytes())]


def storage(value: Any) -> tuple[bytearray, Any] | None:
    """The bytes of a tensor's storage, and its type if it has one; None for anything else.

    torch writes the storage's address beside them, so that equal ones differ in each process.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(value, torch.TypedStorage):
        # Its public name warns that typed storages will go; tensors are still pickled with them.
        plain, dtype = value._untyped_storage, value.dtype
    elif isinstance(value, torch.UntypedStorage):
        plain, dtype = value, None
    else:
        return None
    return bytearray(torch.empty(0, dtype=torch.uint8).set_(plain).numpy()), dtype
