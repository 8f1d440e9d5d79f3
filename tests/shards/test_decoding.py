"""Decoding by field name. That each value is WebDataset's own is shown in tests/torch."""

import gzip
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from shardmill.shards import IMAGE_SPECS, Decoder, MissingDecoder, PickleRefused, encode

ROOT = Path(__file__).parents[2]


def picture_bytes(mode: str = "RGB", form: str = "PNG") -> bytes:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    plane = np.random.default_rng(1).integers(0, 256, (9, 7, *channels), np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(plane).save(stream, form)
    return stream.getvalue()


def packed(field: str, value: object) -> bytes:
    payload = encode(field, value)
    data = bytearray(payload.size)
    payload.write_into(memoryview(data))
    return bytes(data)


@pytest.mark.parametrize(
    ("field", "data", "value"),
    [
        ("txt", "süß".encode(), "süß"),
        ("text", b"a", "a"),
        ("transcript", b"a", "a"),
        ("cls", b"17\n", 17),
        ("cls2", b"-1", -1),
        ("index", b"0", 0),
        ("inx", b"3", 3),
        ("id", b"4", 4),
        ("json", b'{"a": [1, null]}', {"a": [1, None]}),
        ("meta.json", b"[]", []),
        ("jsn", b'"x"', "x"),
        ("json", b"null", b"null"),
        ("json.gz", gzip.compress(b"[1]", mtime=0), [1]),
        ("bin.gz", gzip.compress(b"\x00\x01", mtime=0), b"\x00\x01"),
        ("gz", gzip.compress(b"x", mtime=0), b"x"),
        ("bin", b"\x00\x01", b"\x00\x01"),
        ("class", b"5", b"5"),
        ("count", b"5", b"5"),
        ("html", b"<p>", b"<p>"),
        ("", b"x", b"x"),
        ("__extra__", b"text", "text"),
        ("__extra__", b"\xff", b"\xff"),
    ],
)
def test_a_field_is_decoded_by_the_last_part_of_its_name(field: str, data: bytes, value: object) -> None:
    decoded = Decoder("pil").decode(field, data)

    assert decoded == value
    assert type(decoded) is type(value)


def test_arrays_are_decoded() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    decoder = Decoder("pil")

    assert np.array_equal(decoder.decode("npy", packed("npy", array)), array)
    assert decoder.decode("npz", packed("npz", {"x": array}))["x"].tolist() == array.tolist()
    [decoded] = decoder.decode("ten", packed("ten", array))
    assert decoded.tolist() == array.tolist()
    assert decoded.dtype == np.dtype("i4")


def test_an_array_of_objects_is_not_unpickled() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)

    with pytest.raises(ValueError, match="allow_pickle"):
        Decoder("pil").decode("npy", stream.getvalue())


@pytest.mark.parametrize("spec", [spec for spec, (kind, _, _) in IMAGE_SPECS.items() if kind != "torch"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pictures_are_what_the_spec_says(spec: str, mode: str) -> None:
    kind, wanted, is_float = IMAGE_SPECS[spec]

    value = Decoder(spec).decode("seg.PNG", picture_bytes(mode))

    if kind == "pil":
        assert type(value) is PIL.Image.Image
        assert (value.mode, value.size) == (wanted, (7, 9))
    else:
        assert value.shape == {"L": (9, 7), "RGB": (9, 7, 3), "RGBA": (9, 7, 4)}[wanted]
        assert value.dtype == (np.float32 if is_float else np.uint8)
        assert value.max() <= (1.0 if is_float else 255)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_that_has_its_mode_already_is_what_converting_gives(form: str) -> None:
    stream = io.BytesIO()
    options = {"dpi": (300, 300), "quality": 90} if form == "JPEG" else {"transparency": (1, 2, 3)}
    PIL.Image.linear_gradient("L").convert("RGB").save(stream, form, **options)
    with PIL.Image.open(io.BytesIO(stream.getvalue())) as opened:
        converted = opened.convert("RGB")

    value = Decoder("pil").decode(form.lower(), stream.getvalue())

    assert vars(value).keys() == vars(converted).keys()
    assert type(value) is type(converted)
    assert (value.mode, value.size, value.info) == (converted.mode, converted.size, converted.info)
    assert value.tobytes() == converted.tobytes()
    value.putpixel((0, 0), (9, 9, 9))
    assert value.getpixel((0, 0)) == (9, 9, 9)


def test_a_picture_that_is_none_raises() -> None:
    with pytest.raises(PIL.UnidentifiedImageError):
        Decoder("pil").decode("jpg", b"not a picture")


def test_only_named_fields_are_decoded() -> None:
    decoder = Decoder("rgb8", fields=["cls", "seg.png"])

    assert decoder.decode("cls", b"3") == 3
    assert decoder.decode("png", b"raw") == b"raw"
    assert decoder.decode("txt", b"raw") == b"raw"
    assert decoder.decode("seg.png", picture_bytes()).shape == (9, 7, 3)


def test_without_a_spec_nothing_is_decoded() -> None:
    decoder = Decoder(None)

    assert [decoder.decode(field, b"7") for field in ("cls", "jpg", "pyd", "__x__", "txt.gz")] == [b"7"] * 5


def test_an_unknown_spec_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown decoder 'pillow'; known: l, l8, pil, .*torchrgba8"):
        Decoder("pillow")


@pytest.mark.parametrize("field", ["pyd", "pkl", "pickle", "pth", "x.pyd", "pyd.gz"])
def test_pickles_are_refused_until_allowed(field: str) -> None:
    data = gzip.compress(pickle.dumps(1)) if field.endswith("gz") else pickle.dumps(1)

    with pytest.raises(PickleRefused, match="allow_pickle"):
        Decoder("pil").decode(field, data)


def test_allowed_pickles_are_read() -> None:
    assert Decoder("pil", allow_pickle=True).decode("pyd", pickle.dumps({"a": (1,)})) == {"a": (1,)}


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"~TenBin~",
        b"~TenBin~" + b"\xff" * 8,
        b"~TenBin~" + bytes([255, 0, 0, 0, 0, 0, 0, 0]),
        packed("ten", np.ones(3))[:80],
    ],
)
def test_damaged_tensors_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="ten "):
        Decoder("pil").decode("ten", data)


BARE = """
import sys
sys.path.insert(0, sys.argv[1])
import shardmill.shards
from shardmill.shards import Decoder, EncodeError, MissingDecoder, encode
assert not {"numpy", "PIL", "torch", "webdataset"} & sys.modules.keys()
for field in sys.argv[2:]:
    try:
        print(field, Decoder("pil", allow_pickle=True).decode(field, b""))
    except MissingDecoder as error:
        print(error.name, error.library)
    try:
        encode(field, 1.5 if field != "jpg" else object())
    except EncodeError as error:
        assert "this environment lacks" in str(error), error
"""


def test_a_bare_interpreter_names_the_library_that_each_field_needs() -> None:
    """Run without site-packages, where only the standard library is, as in somebody's small environment."""
    fields = ["jpg", "npy", "npz", "ten", "mp", "cbor", "pth"]

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE, str(ROOT / "src"), *fields], check=True, capture_output=True, text=True
    )

    assert done.stdout.splitlines() == [
        "jpg pillow",
        "npy numpy",
        "npz numpy",
        "ten numpy",
        "mp msgpack",
        "cbor cbor",
        "pth torch",
    ]


def test_errors_survive_pickling() -> None:
    errors: list[Any] = [MissingDecoder("mp", "msgpack"), PickleRefused("pyd")]

    assert [str(pickle.loads(pickle.dumps(error))) for error in errors] == [str(error) for error in errors]


def test_what_is_decoded_is_encoded_to_the_same_bytes() -> None:
    decoder = Decoder("rgb8")
    fields = {"cls": b"3", "txt": b"x", "json": json.dumps({"a": 1.5}).encode(), "npy": packed("npy", np.eye(3))}

    for field, data in fields.items():
        assert packed(field, decoder.decode(field, data)) == data
