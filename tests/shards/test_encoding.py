"""Encoding by field name. That the bytes are WebDataset's own is shown in tests/torch."""

import decimal
import gzip
import io
import pickle

import numpy as np
import PIL.Image
import pytest

from shardmill.shards import EncodeError, encode


def packed(field: str, value: object) -> bytes:
    payload = encode(field, value)
    data = bytearray(payload.size)
    payload.write_into(memoryview(data))
    return bytes(data)


class Indexed:
    """Like a tensor with one integer in it: its text is no number."""

    def __index__(self) -> int:
        return 12

    def __str__(self) -> str:
        return "tensor(12)"


@pytest.mark.parametrize(
    ("field", "value", "data"),
    [
        ("bin", b"\x00", b"\x00"),
        ("bin", bytearray(b"ab"), b"ab"),
        ("npy", memoryview(b"ab"), b"ab"),
        ("jpg", "text", b"text"),
        ("anything.else", "süß", "süß".encode()),
        ("cls", 7, b"7"),
        ("meta.CLS", 7, b"7"),
        ("cls", "7", b"7"),
        ("cls2", np.int64(-3), b"-3"),
        ("index", np.array(5), b"5"),
        ("class", Indexed(), b"12"),
        ("count", 2.5, b"2.5"),
        ("inx", True, b"True"),
        ("id", decimal.Decimal("3"), b"3"),
        ("json", {"a": [1, None, "ü"]}, b'{"a": [1, null, "\\u00fc"]}'),
        ("jsn", None, b"null"),
        ("pyd", (1, "a"), pickle.dumps((1, "a"))),
    ],
)
def test_a_value_is_encoded_by_the_last_part_of_its_fields_name(field: str, value: object, data: bytes) -> None:
    assert packed(field, value) == data


def test_a_compressed_field_is_the_same_whenever_it_is_written() -> None:
    data = packed("json.gz", {"a": 1})

    assert gzip.decompress(data) == b'{"a": 1}'
    assert data[4:8] == bytes(4)  # no time
    assert gzip.decompress(packed("bin.gz", b"raw")) == b"raw"
    assert gzip.decompress(packed("npy.gz", np.ones(2))) == packed("npy", np.ones(2))


@pytest.mark.parametrize(
    ("field", "form"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("img", "JPEG"), ("png", "PNG"), ("tif", "TIFF")]
)
@pytest.mark.parametrize("kind", ["picture", "bytes", "floats"])
def test_pictures_and_arrays_become_pictures(field: str, form: str, kind: str) -> None:
    plane = np.random.default_rng(2).integers(0, 256, (8, 6, 3), np.uint8)
    value: object = plane
    if kind == "picture":
        value = PIL.Image.fromarray(plane)
    elif kind == "floats":
        value = plane.astype(np.float32) / 255.0

    picture = PIL.Image.open(io.BytesIO(packed(field, value)))

    assert (picture.format, picture.mode, picture.size) == (form, "RGB", (6, 8))
    if form != "JPEG":
        assert np.abs(np.asarray(picture).astype(int) - plane).max() <= (1 if kind == "floats" else 0)


@pytest.mark.parametrize(
    ("field", "shape", "magic"), [("ppm", (8, 6, 3), b"P6"), ("pgm", (8, 6), b"P5"), ("pgm", (8, 6, 1), b"P5")]
)
def test_netpbm_is_written(field: str, shape: tuple[int, ...], magic: bytes) -> None:
    assert packed(field, np.zeros(shape, np.uint8)).startswith(magic)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bin", 3, "field 'bin' is int; it takes only bytes or str, for 'bin' has no encoder"),
        ("noextension", None, "field 'noextension' is NoneType"),
        ("txt", 3, "field 'txt' is int; it takes str or bytes"),
        ("a.html", None, "field 'a.html' is NoneType; it takes str or bytes"),
        ("cls", [1], "field 'cls' is list; it takes an integer"),
        ("cls", None, "field 'cls' is NoneType; it takes an integer"),
        ("json", {"a": object()}, "field 'json' is dict; it takes what JSON can hold.*object is not JSON"),
        ("npy", [1, 2], "field 'npy' is list; it takes a numpy array"),
        ("npz", [1], "field 'npz' is list; it takes a dict"),
        ("npz", {"a": [1]}, "field 'npz' is a dict with str → list; it takes a dict of str to numpy array"),
        ("ten", "x".join, "field 'ten' is builtin_function_or_method; it takes a numpy array or a list"),
        ("ten", [np.ones(1), 3], "field 'ten' is a list with int; it takes a numpy array or a list"),
        ("jpg", [[1]], "field 'jpg' is list; it takes a PIL image, a numpy array of shape"),
        ("png", np.zeros((2, 2, 4), "u1"), r"field 'png' is an array of shape \(2, 2, 4\); it takes"),
        ("png", np.zeros((2, 2), "i8"), "field 'png' is an array of int64; it takes uint8, or float32"),
    ],
)
def test_a_wrong_type_names_field_type_and_what_is_accepted(field: str, value: object, said: str) -> None:
    with pytest.raises(EncodeError, match=said):
        encode(field, value)


def test_a_tensor_for_npy_is_told_how() -> None:
    class Tensor:
        def numpy(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return np.ones(1)

    with pytest.raises(EncodeError, match=r"call \.numpy\(\) on a tensor"):
        encode("npy", Tensor())


@pytest.mark.parametrize("value", [np.array([[1.5]]), np.array([[-0.5]]), np.array([[np.nan]])])
def test_float_pictures_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"float pictures are in 0 … 1"):
        encode("png", value)


@pytest.mark.parametrize("dtype", ["u4", "c8", "S1"])
def test_tensors_of_types_the_format_lacks_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="the ten format has no data type"):
        encode("ten", np.zeros(2, dtype))


def test_tensors_need_not_be_contiguous() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)

    assert packed("ten", array.T[::-1]) == packed("ten", np.ascontiguousarray(array.T[::-1]).astype("f4"))


def test_an_encode_error_survives_pickling() -> None:
    error = EncodeError("npy", "list", "a numpy array")

    assert str(pickle.loads(pickle.dumps(error))) == str(error)
