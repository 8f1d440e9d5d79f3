"""Every field as the real WebDataset decodes, encodes, groups and writes it."""

import contextlib
import gzip
import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import autodecode, tariterators, writer
from webdataset.compat import WebDataset

from shardmill.shards import IMAGE_SPECS, Decoder, EncodeError, ShardIndex, ShardWriter, TarError, encode, split_name
from tests.shards.archives import reader, simple_shard


def packed(field: str, value: object) -> bytes:
    payload = encode(field, value)
    data = bytearray(payload.size)
    payload.write_into(memoryview(data))
    return bytes(data)


def their_decode(spec: str, field: str, data: bytes, only: list[str] | None = None) -> Any:
    return autodecode.Decoder([autodecode.imagehandler(spec)], only=only)({field: data})[field]


def their_encode(field: str, value: object) -> bytes:
    return bytes(writer.encode_based_on_extension1(value, field, writer.default_handlers))


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in type, shape, data type, mode and bits."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, PIL.Image.Image):
        assert (ours.mode, ours.size, ours.info) == (theirs.mode, theirs.size, theirs.info)
        assert ours.tobytes() == theirs.tobytes()
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape, ours.strides) == (theirs.dtype, theirs.shape, theirs.strides)
        assert ours.flags.writeable == theirs.flags.writeable
        assert ours.tobytes() == theirs.tobytes()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for our_item, their_item in zip(ours, theirs, strict=True):
            assert_same(our_item, their_item)
    else:
        assert ours == theirs


def picture(mode: str = "RGB", form: str = "PNG", **options: Any) -> bytes:
    plane = np.random.default_rng(3).integers(0, 256, (21, 17, 4), np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(plane, "RGBA").convert(mode).save(stream, form, **options)
    return stream.getvalue()


PICTURES = {
    "jpg": picture("RGB", "JPEG"),
    "jpeg": picture("L", "JPEG", dpi=(300, 300)),
    "JPG": picture("CMYK", "JPEG"),
    "png": picture("RGBA"),
    "seg.png": picture("P", transparency=3),
    "la.png": picture("LA"),
    "bits.png": picture("1"),
    "bmp": picture("RGB", "BMP"),
    "gif": picture("P", "GIF"),
    "tif": picture("RGB", "TIFF"),
    "webp": picture("RGB", "WEBP"),
    "ppm": picture("RGB", "PPM"),
    "rgb": picture("RGB", "SGI"),
}


@pytest.mark.parametrize("spec", autodecode.imagespecs)
@pytest.mark.parametrize("field", PICTURES)
def test_pictures_are_decoded_alike(spec: str, field: str) -> None:
    data = PICTURES[field]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about palettes with transparency
        assert_same(Decoder(spec).decode(field, data), their_decode(spec, field, data))


def test_real_pictures_are_decoded_alike(shards: Path) -> None:
    for path in sorted(shards.glob("*.tar"))[:2]:
        with tarfile.open(path) as archive:
            for info in archive.getmembers()[:40]:
                file = archive.extractfile(info)
                assert file is not None
                data, (_, field) = file.read(), split_name(info.name) or ("", "")
                for spec in ("pil", "rgb", "torchrgb8"):
                    assert_same(Decoder(spec).decode(field, data), their_decode(spec, field, data))


def test_the_tables_have_the_same_names() -> None:
    assert set(IMAGE_SPECS) == set(autodecode.imagespecs)
    decoder = Decoder("pil", allow_pickle=True)
    for name in [*autodecode.IMAGE_EXTENSIONS, *autodecode.decoders]:
        with contextlib.suppress(Exception):
            assert not isinstance(decoder.decode(name, b"\xff\xfe"), bytes), name
    for name in writer.default_handlers:
        said = ""
        try:
            encode(name, iter([]))
        except Exception as error:
            said = str(error)
        assert "has no encoder" not in said, name


def ten(*arrays: Any) -> bytes:
    return bytes(writer.tenbin_dumps(list(arrays)))


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


ARRAY = np.arange(24, dtype="<f4").reshape(2, 3, 4)
FIELDS: dict[str, bytes] = {
    "txt": "süß".encode(),
    "text": b"",
    "transcript": b"a",
    "cls": b"17\n",
    "cls2": b" -1 ",
    "class": b"5",
    "count": b"5",
    "index": b"0",
    "inx": b"1_0",
    "id": b"3",
    "json": json.dumps({"a": [1, 2.5, None, "ü"]}).encode(),
    "null.json": b"null",
    "jsn": b"[NaN]",
    "npy": writer.numpy_dumps(ARRAY),
    "f.npy": writer.numpy_dumps(np.asfortranarray(ARRAY)),
    "npz": writer.numpy_npz_dumps({"a": ARRAY, "b": np.zeros(0)}),
    "ten": ten(ARRAY, np.zeros((0, 3), "i8"), np.arange(5, dtype="u1")),
    "tb": ten(ARRAY),
    "tenbin": ten(ARRAY),
    "mp": writer.mp_dumps({"a": [1, b"x"]}),
    "msg": writer.mp_dumps([1.5]),
    "msgpack": writer.mp_dumps([1.5]),
    "cbor": writer.cbor_dumps({"a": [1, "x"]}),
    "pyd": pickle.dumps({"a": (1, 2)}),
    "pkl": pickle.dumps(None),
    "pickle": pickle.dumps([1]),
    "pth": saved(lambda stream: torch.save({"w": torch.arange(4.0)}, stream)),
    "json.gz": gzip.compress(b'{"a": 1}'),
    "jpg.gz": gzip.compress(PICTURES["jpg"]),
    "bin.gz": gzip.compress(b"\x00\x01") + gzip.compress(b"\x02"),
    "gz": gzip.compress(b"x"),
    "txt.gz.gz": gzip.compress(gzip.compress(b"x")),
    "html": b"<p>",
    "bin": bytes(range(256)),
    "mp4": b"no video",
    "": b"empty extension",
    "__text": b"text",
    "__bytes": b"\xff",
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_fields_are_decoded_alike(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = FIELDS[field]
    ours = Decoder("rgb8", allow_pickle=True).decode(field, data)

    if field == "jsn":
        assert json.dumps(ours) == json.dumps(their_decode("rgb8", field, data))
    else:
        assert_same(ours, their_decode("rgb8", field, data))
    capsys.readouterr()  # WebDataset prints what it cannot decode


def test_only_named_fields_are_decoded_alike() -> None:
    only = ["cls", "seg.png", "gz"]
    for field, data in [("cls", b"3"), ("a.cls", b"3"), ("png", b"x"), ("seg.png", PICTURES["png"]), ("txt.gz", b"x")]:
        assert_same(Decoder("rgb8", fields=only).decode(field, data), their_decode("rgb8", field, data, only))


PLANE = np.random.default_rng(4).integers(0, 256, (10, 12, 3), np.uint8)
VALUES: list[tuple[str, object]] = [
    ("bin", b"bytes"),
    ("jpg", b"bytes"),
    ("anything", "text ü"),
    ("cls", 7),
    ("CLS", np.int64(7)),
    ("cls2", "7"),
    ("class", 2.5),
    ("count", True),
    ("index", np.array(5)),
    ("inx", np.float32(1.5)),
    ("id", 10**30),
    ("txt", "ü"),
    ("html", "<p>"),
    ("json", {"a": [1, None, "ü", 1.5]}),
    ("jsn", [float("nan")]),
    ("json", None),
    ("pyd", {"a": (1, 2)}),
    ("pickle", [1]),
    ("pth", {"w": torch.arange(4.0)}),
    ("npy", ARRAY),
    ("npy", np.asfortranarray(ARRAY)),
    ("npy", ARRAY.transpose(2, 0, 1)),
    ("npy", ARRAY[:, ::-1]),
    ("npy", np.float64(2.5)),
    ("npy", np.array([{"a": 1}], dtype=object)),
    ("npz", {"a": ARRAY, "b": np.zeros(0)}),
    ("ten", ARRAY),
    ("tenbin", [ARRAY, np.zeros((0, 3), "i8"), np.arange(5, dtype="u1")]),
    ("tb", [np.array([1.5, 2.5], "f2")]),
    ("mp", {"a": [1, b"x"]}),
    ("msgpack", [1.5]),
    ("msg", None),
    ("cbor", {"a": [1, "x"]}),
    ("jpg", PLANE),
    ("jpeg", PIL.Image.fromarray(PLANE)),
    ("img", PLANE[:, :, 0]),
    ("image", PLANE.astype("f4") / 255),
    ("png", PLANE),
    ("seg.PNG", PLANE.astype("f8") / 255),
    ("png", PIL.Image.fromarray(PLANE).convert("P")),
    ("png", np.array([[0.0, 1.0005], [-0.0005, 0.5]])),
    ("png", np.array([[True, False]])),
    ("ppm", PLANE),
    ("tif", PLANE),
    ("tiff", PLANE[:, :, 0]),
]


@pytest.mark.parametrize(("field", "value"), VALUES, ids=[f"{n}-{field}" for n, (field, _) in enumerate(VALUES)])
def test_values_are_encoded_alike(field: str, value: object) -> None:
    theirs = their_encode(field, value)

    assert packed(field, value) == theirs
    ours = packed(f"{field}.gz", value)
    assert gzip.decompress(ours) == theirs
    assert gzip.decompress(their_encode(f"{field}.gz", value)) == theirs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("npy", torch.ones(2)),
        ("npy", [1, 2]),
        ("npz", {"a": [1]}),
        ("ten", torch.ones(2, dtype=torch.float32).tolist()),
        ("ten", np.zeros(2, "u4")),
        ("jpg", torch.ones(2, 2)),
        ("png", np.zeros((2, 2, 4), "u1")),
        ("png", np.full((2, 2), 1.5)),
        ("txt", 3),
        ("json", {"a": ARRAY}),
        ("bin", 3),
        ("unknown", ARRAY),
    ],
    ids=[f"{n}" for n in range(12)],
)
def test_what_they_refuse_is_refused(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError, AssertionError, AttributeError)):
        their_encode(field, value)
    with pytest.raises((EncodeError, ValueError)):
        encode(field, value)


def test_a_class_in_a_tensor_is_a_number() -> None:
    """WebDataset writes its text, `tensor(5)`, which no reader takes as a class."""
    assert packed("cls", torch.tensor(5)) == b"5"
    with pytest.raises(EncodeError, match="an integer"):
        encode("cls", torch.tensor([1.5, 2.5]))


@settings(max_examples=1000, deadline=None)
@given(st.text("aB./_\n", max_size=10))
def test_names_are_split_alike(name: str) -> None:
    key, field = tariterators.base_plus_ext(name)

    assert split_name(name) == (None if key is None or field is None else (key, field.lower()))


def their_samples(data: bytes) -> list[tuple[str, dict[str, bytes]]] | None:
    """None: they raise."""
    files = tariterators.tar_file_expander([{"url": "x.tar", "stream": io.BytesIO(data)}])
    try:
        samples = list(tariterators.group_by_keys(files))
    except ValueError:
        return None
    return [(s["__key__"], {k: v for k, v in s.items() if k not in ("__key__", "__url__")}) for s in samples]


def our_samples(data: bytes) -> list[tuple[str, dict[str, bytes]]] | None:
    index = ShardIndex(reader(data), len(data))
    samples: list[tuple[str, dict[str, bytes]]] = []
    try:
        while batch := index.advance(5):
            for sample in batch:
                payloads = {f.name: data[f.member.offset : f.member.offset + f.member.size] for f in sample.fields}
                samples.append((sample.key, payloads))
    except TarError:
        return None
    return samples


NAMES = st.lists(
    st.builds(
        "{}{}".format,
        st.sampled_from(["a", "b", "d/a", "d.x/a", "__m__/a", "__m__", "__a", "README", "d/"]),
        st.sampled_from([".jpg", ".JPG", ".seg.png", ".cls", ".", "", "__", ".__bad__", ".__key__", ".__url__"]),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(NAMES, st.binary(max_size=2))
def test_members_are_grouped_alike(names: list[str], payload: bytes) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))

    assert our_samples(stream.getvalue()) == their_samples(stream.getvalue())


def test_real_shards_are_grouped_alike(shards: Path) -> None:
    for path in sorted(shards.glob("*.tar")):
        data = path.read_bytes()
        assert our_samples(data) == their_samples(data)


def test_a_shard_is_written_byte_for_byte_as_tarwriter_writes_it() -> None:
    samples: list[dict[str, object]] = [
        {"__key__": "train/0001", "npy": ARRAY, "cls": 3, "_meta": "m", "JSON": {"a": 1}, "bin": b""},
        {"__key__": "d" * 120, "jpg": PLANE, "txt": "ü"},
        {"__key__": "ä", "seg.png": PLANE},
    ]
    theirs, ours = io.BytesIO(), io.BytesIO()

    with writer.TarWriter(theirs, mtime=0) as their_writer:
        for sample in samples:
            their_writer.write(sample)
    with ShardWriter(ours) as our_writer:
        for sample in samples:
            our_writer.write(sample)

    assert ours.getvalue() == theirs.getvalue()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves the file open
def test_what_is_written_is_read_by_a_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with path.open("wb") as file, ShardWriter(file) as our_writer:
        for ordinal in range(5):
            our_writer.write({"__key__": f"{ordinal:04d}", "npy": ARRAY + ordinal, "cls": ordinal})

    dataset: Any = WebDataset(str(path), shardshuffle=False)
    samples = list(dataset.decode("pil"))

    assert [(sample["__key__"], sample["cls"]) for sample in samples] == [(f"{n:04d}", n) for n in range(5)]
    assert all(np.array_equal(sample["npy"], ARRAY + n) for n, sample in enumerate(samples))


def test_a_simple_shard_of_the_tests_is_one_for_webdataset() -> None:
    assert their_samples(simple_shard([("a", {"x": b"1"})])) == [("a", {"x": b"1"})]
