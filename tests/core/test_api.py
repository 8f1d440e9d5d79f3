"""Wire types of the API: what is sent is read back, and nothing unknown slips in."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core import api
from shardmill.core.api import Code, ErrorBody, ObjectInfo, ObjectPage, TransformRequest

STRUCTS = [value for value in vars(api).values() if isinstance(value, type) and issubclass(value, msgspec.Struct)]


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_every_type_is_frozen(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.frozen


@given(
    st.builds(
        ObjectPage,
        st.lists(
            st.builds(
                ObjectInfo,
                key=st.text(min_size=1),
                size=st.integers(0, 2**63 - 1),
                modified=st.floats(0, 4e9),
                etag=st.none() | st.text(),
                checksum=st.none() | st.text(),
                user=st.dictionaries(st.text(), st.text(), max_size=3),
            ),
            max_size=3,
        ),
        st.lists(st.text(), max_size=3),
        st.none() | st.text(),
    )
)
def test_a_page_is_read_back(page: ObjectPage) -> None:
    assert msgspec.json.decode(msgspec.json.encode(page), type=ObjectPage) == page


@given(st.binary(max_size=50))
def test_code_travels_as_base64(payload: bytes) -> None:
    code = Code("cloudpickle", payload, "0" * 64, "3.11")
    wire = msgspec.json.encode(code)
    assert isinstance(msgspec.json.decode(wire)["payload"], str)
    assert msgspec.json.decode(wire, type=Code) == code


REQUEST: dict[str, Any] = {
    "name": "t",
    "code": {"encoding": "source", "payload": "", "form": "0" * 64, "python": "3.11"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"sed": 1},
        {"name": None},
        {"kind": "video"},
        {"fields": "jpg"},
        {"args": []},
        {"code": {**REQUEST["code"], "extra": 1}},
        {"code": {**REQUEST["code"], "encoding": "pickle"}},
        {"code": {**REQUEST["code"], "payload": "not base64!"}},
        {"code": None},
    ],
)
def test_a_registration_with_a_wrong_or_unknown_field_is_refused(change: dict[str, Any]) -> None:
    assert msgspec.json.decode(msgspec.json.encode(REQUEST), type=TransformRequest).name == "t"
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode({**REQUEST, **change}), type=TransformRequest)


def test_an_error_body_leaves_out_what_it_has_not() -> None:
    assert msgspec.json.decode(msgspec.json.encode(ErrorBody("conflict", "m", "r1"))) == {
        "code": "conflict",
        "message": "m",
        "request_id": "r1",
    }
