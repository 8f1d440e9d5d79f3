"""The registry of versions: found by digest and arguments, also after a restart."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from shardmill.core.errors import Conflict, TransformNotFound
from shardmill.core.specs import Spec
from shardmill.etl.versions.pipelines import build_pipeline
from shardmill.etl.versions.registry import Version, Versions, build_info, compute_digest
from tests.etl.support import IDENTITY, request_for


def version_with(args: dict[str, object] | None) -> Version:
    request = msgspec.structs.replace(request_for(IDENTITY), args=args)
    return Version(
        build_info(request, "default", None, digest=compute_digest(request)), request.code, allow_pickle=False
    )


def test_versions_with_arguments_are_found_again_after_a_restart(tmp_path: Path) -> None:
    arguments: list[dict[str, object] | None] = [None, {"size": 1}, {"size": 2.5, "names": ["a", "é"]}]
    made = [version_with(args) for args in arguments]
    registry = Versions(tmp_path)
    for version in made:
        assert asyncio.run(registry.add(version))
    for found in (registry, Versions(tmp_path)):
        for version in made:
            spec = Spec.parse(version.info.uuid)
            assert found.get("t", spec.digest, spec.args) == version
        with pytest.raises(TransformNotFound, match="args=0123456789ab"):
            found.get("t", made[0].info.digest, "0123456789ab")


def test_what_there_is_not_is_answered_with_what_comes_near(tmp_path: Path) -> None:
    registry = Versions(tmp_path)
    with pytest.raises(TransformNotFound, match="none is registered"):
        registry.get("t")
    version = version_with(None)
    for name in ("augment", *(f"other-{number:02}" for number in range(12))):
        info = msgspec.structs.replace(version.info, name=name, uuid=f"{name}@{version.info.digest[:12]}")
        asyncio.run(registry.add(Version(info, version.code, allow_pickle=False)))
    with pytest.raises(TransformNotFound, match=r"^no transform 'augmnt'; did you mean 'augment'\?$"):
        registry.get("augmnt")
    with pytest.raises(TransformNotFound, match=f"; of augment there is augment@{version.info.digest[:12]}$"):
        registry.get("augment", "0" * 12)
    with pytest.raises(TransformNotFound, match=r"; registered: augment, other-00, .*, other-08 and 3 more$"):
        registry.get("zzz")


def test_without_arguments_people_get_the_version_that_was_registered_last(tmp_path: Path) -> None:
    registry = Versions(tmp_path)
    first, second = version_with({"size": 1}), version_with({"size": 2})
    digits = first.info.digest[:12]
    asyncio.run(registry.add(first))
    asyncio.run(registry.add(second))
    assert registry.find("t", digits, None) == second
    assert registry.find("t", None, None) == second
    assert registry.find("t", digits, Spec.parse(first.info.uuid).args) == first
    with pytest.raises(TransformNotFound):
        registry.get("t", digits)


def test_versions_of_the_form_before_are_found_by_their_digests(tmp_path: Path) -> None:
    version = version_with(None)
    asyncio.run(Versions(tmp_path).add(version))
    [record] = tmp_path.glob("*/*.json")
    record.write_bytes(record.read_bytes().replace(b'"form":3,', b'"form":1,'))
    assert Versions(tmp_path).list() == [version]
    record.write_bytes(record.read_bytes().replace(b'"form":1,', b'"form":4,'))
    assert Versions(tmp_path).list() == []


def test_what_is_decoded_is_part_of_a_digest_however_it_is_named() -> None:
    fields: list[list[str] | None] = [None, [], ["*"], ["a,b"], ["a", "b"], ["a\0False\0b"]]
    requests = [msgspec.structs.replace(request_for(IDENTITY), fields=names) for names in fields]
    decoders = [None, "", "pil", "pil\0False\0a"]
    requests += [msgspec.structs.replace(request_for(IDENTITY), decoder=decoder, fields=["b"]) for decoder in decoders]
    assert len({compute_digest(request) for request in requests}) == len(requests)
    one, other = (
        msgspec.structs.replace(request_for(IDENTITY), fields=names) for names in (["a", "b"], ["b", "a", "b"])
    )
    assert compute_digest(one) == compute_digest(other)


def test_arguments_made_to_have_the_same_twelve_digits_are_others(tmp_path: Path) -> None:
    """Such pairs are found in a minute: of neither the workers, the results nor the pipelines are the other's."""
    one, other = (version_with({"x": number}) for number in (12127942, 16124442))
    assert one.info.uuid == other.info.uuid
    assert one.key != other.key
    pipelines = [build_pipeline("p", [version, version], None).code.form for version in (one, other)]
    assert pipelines[0] != pipelines[1]
    registry = Versions(tmp_path)
    asyncio.run(registry.add(one))
    with pytest.raises(Conflict, match=rf"{one.info.uuid} is registered with other arguments"):
        asyncio.run(registry.add(other))
    assert registry.list() == [one]
    assert asyncio.run(registry.add(one)) is False
