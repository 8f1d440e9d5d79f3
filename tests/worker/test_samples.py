"""One sample through a function: untouched fields byte for byte, touched ones encoded, everything odd a failure."""

import io
import json
import os
import pickle
import tarfile
import weakref
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import pytest

from shardmill.shards.decoding import Decoder
from shardmill.worker.calls import SampleFailure
from shardmill.worker.samples import Output, SampleWork, SourceChanged, SourceSample, is_same
from tests.etl.support import write_shard
from tests.worker.driving import URL, described


def packed(picture: PIL.Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def saved(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


GRADIENT = np.arange(30 * 40 * 3, dtype=np.uint32).reshape(30, 40, 3)
PICTURE = PIL.Image.fromarray((GRADIENT % 256).astype(np.uint8))

# Each as no encoder of ours would write it, so that only passing through gives it back.
FIELDS = {
    "jpg": packed(PICTURE, "JPEG", quality=31, progressive=True, comment=b"kept"),
    "png": packed(PICTURE, "PNG", compress_level=9, dpi=(300, 300)),
    "deep.png": packed(PIL.Image.fromarray((GRADIENT[:, :, 0] * 50 % 65536).astype(np.uint16)), "PNG"),
    "palette.png": packed(PICTURE.quantize(8), "PNG", transparency=3),
    "json": b'{ "b" : 1.50,"a":[ 1e3, NaN, -0.0, "\\u00e4", null],\n "a": 2 }',
    "txt": "caf\u00e9 \U0001f600\r\n".encode(),
    "cls": b"007",
    "npy": saved(np.asfortranarray(GRADIENT.astype(">f4")))[:-1] + b"\x01",
    "npz": b"",
    "unknown": bytes(range(256)),
    "__extra__": b"not a member",
}
stream = io.BytesIO()
np.savez(stream, a=np.array([np.nan, 1.0]), b=np.array(["x"]))
FIELDS["npz"] = stream.getvalue()


class Case:
    """A shard of one sample, and functions applied to it."""

    def __init__(self, path: Path, fields: dict[str, bytes], decoder: str | None = "pil") -> None:
        write_shard(path, [fields])
        ((ordinal, key, rows),) = described(path)
        self.descriptor = os.open(path, os.O_RDONLY)
        self.sample = SourceSample(key, ordinal, URL, self.descriptor, rows)
        self.work = SampleWork(Decoder(decoder, allow_pickle=True))

    def apply(self, function: Any) -> list[Output]:
        self.work.start_clock()
        return list(self.work.apply([function], self.sample, self.work.decode(self.sample)))

    def members(self, function: Any) -> dict[str, bytes]:
        """All framed outputs read back."""
        framed = b""
        for output in self.apply(function):
            data = bytearray(output.size)
            output.frame_into(memoryview(data))
            framed += data
        found = {}
        with tarfile.open(fileobj=io.BytesIO(framed + bytes(1024))) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
        return found

    def message(self, function: Any) -> str:
        with pytest.raises(SampleFailure) as caught:
            self.apply(function)
        return caught.value.message


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path / "s.tar", FIELDS)
    yield made
    os.close(made.descriptor)


@pytest.mark.parametrize("decoder", [None, "pil", "rgb", "rgb8", "l8", "pilrgba"])
def test_untouched_fields_pass_byte_for_byte(tmp_path: Path, decoder: str | None) -> None:
    case = Case(tmp_path / "s.tar", FIELDS, decoder)
    expected = {f"0000.{name}": data for name, data in FIELDS.items() if not name.startswith("_")}
    functions: list[Any] = [
        lambda sample: sample,
        dict,
        lambda sample: {name: sample.pop(name) for name in sorted(sample)},
    ]
    for function in functions:
        found = case.members(function)
        assert found == expected
        assert list(found) == sorted(expected)
    os.close(case.descriptor)


def test_a_sample_has_the_fields_that_webdataset_gives(case: Case) -> None:
    seen: dict[str, Any] = {}
    case.apply(seen.update)
    assert seen["__key__"] == "0000"
    assert seen["__url__"] == URL
    assert seen["__extra__"] == "not a member"
    assert (seen["cls"], seen["txt"]) == (7, "caf\u00e9 \U0001f600\r\n")
    assert seen["jpg"].mode == "RGB"
    assert sorted(seen) == sorted([*FIELDS, "__key__", "__url__"])


def test_what_the_function_lets_go_of_is_gone(case: Case) -> None:
    def shrink(sample: dict[str, Any]) -> dict[str, Any]:
        pictures, arrays = weakref.ref(sample["jpg"]), weakref.ref(sample["npy"])
        sample["jpg"] = sample["jpg"].resize((2, 2))
        del sample["npy"]
        assert pictures() is arrays() is None
        return sample

    assert "0000.npy" not in case.members(shrink)


def edit_picture(sample: dict[str, Any]) -> dict[str, Any]:
    sample["png"].putpixel((0, 0), (1, 2, 3))
    return sample


def edit_json(sample: dict[str, Any]) -> dict[str, Any]:
    sample["json"]["b"] = 3
    return sample


def edit_zero(sample: dict[str, Any]) -> dict[str, Any]:
    sample["json"]["b"] = -0.0
    return sample


def edit_array(sample: dict[str, Any]) -> dict[str, Any]:
    sample["npy"][0, 0, 0] = 9
    return sample


def reorder_json(sample: dict[str, Any]) -> dict[str, Any]:
    sample["json"]["b"] = sample["json"].pop("b")
    return sample


def edit_npz(sample: dict[str, Any]) -> dict[str, Any]:
    sample["npz"]["b"][0] = "y"
    return sample


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (edit_picture, "png"),
        (edit_json, "json"),
        (edit_zero, "json"),
        (reorder_json, "json"),
        (edit_array, "npy"),
        (edit_npz, "npz"),
        (lambda sample: sample | {"txt": sample["txt"] + "!"}, "txt"),
        (lambda sample: sample | {"cls": 8}, "cls"),
    ],
)
def test_an_edit_in_place_is_seen_and_touches_nothing_else(case: Case, edit: Any, field: str) -> None:
    found = case.members(edit)
    assert found.pop(f"0000.{field}") != FIELDS[field]
    assert found == {f"0000.{name}": data for name, data in FIELDS.items() if name not in (field, "__extra__")}


def test_none_in_the_place_of_a_field_is_not_the_field(case: Case, tmp_path: Path) -> None:
    assert "field 'jpg'" in case.message(lambda sample: sample.update(jpg=None) or sample)
    kept = Case(tmp_path / "pickled.tar", {"pickle": pickle.dumps(UserDict(a=1))})
    found = kept.members(lambda sample: sample.update(pickle=None) or sample)
    assert pickle.loads(found["0000.pickle"]) is None
    os.close(kept.descriptor)


def test_an_equal_value_of_its_own_counts_as_touched(case: Case) -> None:
    found = case.members(lambda sample: sample | {"json": json.loads(FIELDS["json"]), "cls": int("7" * 20)})
    assert found["0000.json"] == json.dumps(json.loads(FIELDS["json"])).encode()
    assert found["0000.cls"] == b"7" * 20


def test_none_drops_and_iterables_fan_out(case: Case) -> None:
    assert case.members(lambda sample: None) == {}
    assert case.members(lambda sample: []) == {}

    def several(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"txt": "a"}
        yield {"__key__": "own/name", "txt": "b"}
        yield {"__key__": sample["__key__"], "txt": "c"}
        yield sample

    found = case.members(several)
    assert {name: data for name, data in found.items() if name.endswith("txt")} == {
        "0000-0.txt": b"a",
        "own/name.txt": b"b",
        "0000-2.txt": b"c",
        "0000-3.txt": FIELDS["txt"],
    }
    assert found["0000-3.jpg"] == FIELDS["jpg"]


def test_a_sample_without_fields_is_an_output_without_members(case: Case) -> None:
    (output,) = case.apply(lambda sample: {"__key__": "a", "_private": object(), 5: "no name"})
    assert (output.key, output.size) == ("a", 0)


class EvilMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> NoReturn:
        raise SystemExit(f"no {key}")

    def __iter__(self) -> Iterator[str]:
        return iter(["txt"])

    def __len__(self) -> int:
        return 1


class Evil:
    """Raises whatever it is asked."""

    def __repr__(self) -> NoReturn:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> NoReturn:
        raise RuntimeError("no comparison")

    def __reduce__(self) -> NoReturn:
        raise MemoryError

    def __bytes__(self) -> NoReturn:
        raise RuntimeError("no bytes")

    __hash__ = None  # type: ignore[assignment]


def refuse_class(self: object) -> NoReturn:
    raise RuntimeError("no class")


NoClass = type("NoClass", (), {"__class__": property(refuse_class)})


def raise_at_the_second(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"txt": "a"}
    raise KeyError("second")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda sample: 42, "the function returned int"),
        (lambda sample: "text", "the function returned str"),
        (lambda sample: b"bytes", "the function returned bytes"),
        (lambda sample: [1], "item 0 is int, not a dict"),
        (lambda sample: [{"txt": "a"}, None], "item 1 is NoneType, not a dict"),
        (raise_at_the_second, "KeyError: 'second'"),
        (lambda sample: {"__key__": 5}, "__key__ is 5, not a name"),
        (lambda sample: {"__key__": "a\0b"}, "not a name"),
        (lambda sample: {"__key__": Evil()}, "RuntimeError: no repr"),
        (lambda sample: NoClass(), "RuntimeError: no class"),
        (lambda sample: [NoClass()], "RuntimeError: no class"),
        (lambda sample: EvilMapping(), "SystemExit: no __key__"),
        (lambda sample: {"txt": Evil()}, "field 'txt' of sample '0000' cannot be encoded"),
        (lambda sample: {"pyd": Evil()}, "field 'pyd' of sample '0000' cannot be encoded"),
        (lambda sample: {"pyd": lambda: 0}, "cannot be encoded"),
        (lambda sample: {"unknown": 5}, "'unknown' has no encoder"),
        (lambda sample: {"txt": "\ud800"}, "cannot be encoded"),
        (lambda sample: {"__key__": "\ud800", "txt": "a"}, "UnicodeEncodeError"),
        (lambda sample: {"jpg": np.zeros((3, 3, 3), np.float32) + 7}, "cannot be encoded"),
        (lambda sample: {"__key__": "a.b", "txt": "a"}, "would not be read back as field 'txt' of sample 'a.b'"),
        (lambda sample: {"a/b": "a"}, "would not be read back"),
        (lambda sample: {"txt": "a", "TXT": "b"}, "fields that differ only in case: TXT, txt"),
        (lambda sample: {name: sample.pop(name) for name in sample}, "RuntimeError: dictionary"),
        (lambda sample: sample["nothing"], "KeyError: 'nothing'"),
    ],
)
def test_what_cannot_be_a_sample_is_that_samples_failure(case: Case, function: Any, message: str) -> None:
    assert message in case.message(function)


def test_a_member_that_cannot_be_decoded_names_its_field(tmp_path: Path) -> None:
    for name, data, error in (
        ("jpg", FIELDS["jpg"][:300], "OSError: image file is truncated"),
        ("json", b"{", "JSONDecodeError"),
        ("cls", b"seven", "ValueError"),
        ("npy", b"\x93NUMPY\x09", "ValueError"),
        ("txt", b"\xff", "UnicodeDecodeError"),
        ("pyd", b"cposix\n_exit_no_such\n.", "AttributeError"),
        ("pyd", b"cbuiltins\nexit\n)R.", "NameError|SystemExit|AttributeError"),
    ):
        case = Case(tmp_path / "bad.tar", {name: data})
        with pytest.raises(SampleFailure, match=f"field '{name}' of sample '0000' cannot be decoded: .*({error})"):
            case.apply(lambda sample: sample)
        os.close(case.descriptor)


def test_a_pickle_that_leaves_is_a_failure_of_its_sample(tmp_path: Path) -> None:
    case = Case(tmp_path / "s.tar", {"pyd": b"csys\nexit\n)R."})
    with pytest.raises(SampleFailure, match="SystemExit"):
        case.apply(lambda sample: sample)
    os.close(case.descriptor)


def test_a_shard_that_has_become_shorter_is_no_sample_failure(tmp_path: Path) -> None:
    case = Case(tmp_path / "s.tar", {"txt": b"x" * 5000})
    os.truncate(tmp_path / "s.tar", 2000)
    with pytest.raises(SourceChanged, match="ends at byte 2000"):
        case.apply(lambda sample: sample)
    os.close(case.descriptor)


def test_time_is_told_by_stage(case: Case) -> None:
    case.apply(lambda sample: sum(range(200_000)) and None)
    read, decode, user, encode = case.work.take_clock()
    assert min(read, decode, user, encode) >= 0
    assert user > 0
    assert case.work.take_clock()[2] == 0


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (1, 1.0, False),
        (1.0, 1.0, True),
        (float("nan"), float("nan"), True),
        (0.0, -0.0, False),
        ([1, {"a": (2, None)}], [1, {"a": (2, None)}], True),
        ([1], (1,), False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ([1, 2], [1], False),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.array([1], "i4"), np.array([1], "i8"), False),
        (np.zeros((2, 3)), np.zeros((3, 2)), False),
        ({1, 2}, {2, 1}, True),
        (bytearray(b"a"), bytearray(b"a"), True),
    ],
)
def test_equality_is_exact(left: object, right: object, expected: bool) -> None:
    assert is_same(left, right) is expected
