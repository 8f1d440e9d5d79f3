"""Requirements as people write them, and what must never reach a resolver's file."""

import pytest

from shardmill.core.errors import BadRequest
from shardmill.core.requirements import MAX_REQUIREMENTS, Requirement, parse_requirements


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("numpy", "numpy", "numpy"),
        (" NumPy ", "numpy", "numpy"),
        ("Foo_Bar.baz", "foo-bar-baz", "foo-bar-baz"),
        # A name may have dots: no file is meant.
        ("x.whl", "x-whl", "x-whl"),
        ("opencv-python-headless>=4.10", "opencv-python-headless", "opencv-python-headless>=4.10"),
        ("numpy >= 1.26 , < 3", "numpy", "numpy<3,>=1.26"),
        ("numpy (>=1.26)", "numpy", "numpy>=1.26"),
        ("pillow==11.*", "pillow", "pillow==11.*"),
        ("torch==2.4.0+cpu", "torch", "torch==2.4.0+cpu"),
        ("albumentations[imgaug, Text]~=2.0", "albumentations", "albumentations[imgaug,text]~=2.0"),
        ("x===1.0-weird", "x", "x===1.0-weird"),
        ("av ; python_version  < '3.13'", "av", "av ; python_version < '3.13'"),
        ("av>=14;sys_platform=='linux' and extra != \"x\"", "av", "av>=14 ; sys_platform=='linux' and extra != \"x\""),
        # Not what it looks like, but for the resolver to say.
        ("numpy=>1", "numpy", "numpy=>1"),
    ],
)
def test_a_requirement_in_its_normal_form(text: str, name: str, line: str) -> None:
    requirement = Requirement.parse(text)
    assert (requirement.name, requirement.text) == (name, line)
    assert Requirement.parse(line) == requirement


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "..", "./wheel.whl", "/tmp/x.whl", "dir/", "a/b", "-r other.txt", "--index-url=http://x",
        "-e .", "numpy --index-url http://x", "numpy; --hash=sha256:00", "numpy ; os_name == 'x' --hash=sha256:0",
        "numpy\n--index-url http://evil", "numpy\r-r x", "numpy #x", "numpy\\", "numpy==${SECRET}", "numpy==$X", "nümpy",
        "x @ https://example.org/x-1-py3-none-any.whl", "x@file:///etc/passwd", "git+https://example.org/x", "x>=1;",
        "https://example.org/x.whl", "-x", "_x", "x-", "[extra]", "x[a", "x" * 600, "x\0", "x==1 y==2", "x,y",
    ],
)  # fmt: skip
def test_what_is_no_requirement_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(BadRequest, match=r"is not a requirement such as .* find_links"):
        Requirement.parse(text)


def test_lists_that_mean_the_same_are_the_same() -> None:
    first = parse_requirements(["pillow", "NumPy>=1, <3", "pillow"])
    assert first == parse_requirements(("numpy<3,>=1", "Pillow"))
    assert [str(requirement) for requirement in first] == ["numpy<3,>=1", "pillow"]


def test_no_list_is_longer_than_the_bound() -> None:
    names = [f"x{number}" for number in range(MAX_REQUIREMENTS)]
    assert len(parse_requirements(names)) == MAX_REQUIREMENTS
    with pytest.raises(BadRequest, match="at most"):
        parse_requirements([*names, "one-more"])
