"""Transforms registered with packages, over HTTP: what they run in, what it is kept from, and how it comes and goes."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardmill import Client, WDTransform
from shardmill.core.api import EnvironmentInfo, TransformInfo
from shardmill.core.errors import AccessDenied, BadRequest, Conflict, EnvironmentUnfit, NotFound
from shardmill.worker.limits import landlock_version
from tests.etl.over_http import Served, serve
from tests.etl.support import members, request_for, write_shard
from tests.etl.wheels import repack, write_wheel

SHARD = "s.tar"
URI = f"gs://shards/{SHARD}"

PAINTING = """
    import colours

    def transform(sample):
        sample["txt"] = colours.NAME.encode()
        return sample
"""
LOOKING = """
    def transform(sample):
        found = []
        for name in ("aiohttp", "msgspec", "lmdb", "uv", "pytest", "colours", "cloudpickle"):
            try:
                __import__(name)
            except ImportError:
                continue
            found.append(name)
        sample["txt"] = " ".join(found).encode()
        return sample
"""


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """`colours` 1.0 and 2.0; names instead of numpy and pillow, which nothing here imports."""
    directory = tmp_path / "wheels"
    for name in ("numpy", "pillow"):
        write_wheel(directory, name, "1.0", {f"base_{name}.py": ""})
    for version, colour in (("1.0", "red"), ("2.0", "blue")):
        write_wheel(directory, "colours", version, {"colours.py": f"NAME = {colour!r}\n"})
    return directory


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    directory.mkdir()
    write_shard(directory / SHARD, [{"txt": b"grey"}] * 4)
    return directory


@pytest.fixture
def start(tmp_path: Path, shards: Path, wheels: Path) -> Callable[..., Any]:
    """Starts a node on the same data each time it is called."""
    environ = {"SHARDMILL_PACKAGES_FIND_LINKS": str(wheels), "SHARDMILL_PACKAGES_NO_INDEX": "true"}
    return lambda **more: serve(shards, "--workers", "1", data=tmp_path / "data", environ=environ | more)


@pytest.fixture
def node(start: Callable[..., Any]) -> Iterator[Served]:
    with start() as served:
        yield served


@pytest.fixture
def client(node: Served) -> Iterator[Client]:
    with Client(node.node.endpoint) as client:
        yield client


def text_of(served: Served, info: TransformInfo, options: str = ",seed=1") -> str:
    answer = served.get(info, SHARD, options)
    assert answer.status == 200, answer.body
    [text] = set(members(answer.body).values())
    return text.decode()


def environments(served: Served) -> dict[str, EnvironmentInfo]:
    found = msgspec.json.decode(served.ask("GET", "/api/environments").body)["environments"]
    return {item["name"]: msgspec.convert(item, EnvironmentInfo) for item in found}


def paint(sample: dict[str, Any]) -> dict[str, Any]:
    import colours  # type: ignore[import-not-found]  # of a wheel that only the node's environment has

    sample["txt"] = colours.NAME
    return sample


def test_a_function_brings_its_packages(node: Served, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    etl = WDTransform(client, paint, wd_decoder=None, verbose=True, packages=["Colours<2"])
    info = etl.info
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "resolving colours<2", "resolved to colours==1.0, numpy==1.0, pillow==1.0", "installing 3 packages",
    ]  # fmt: skip
    assert said[4].startswith(f"built environment {info.environment}")
    assert (info.packages, info.locked) == (["colours<2"], ["colours==1.0", "numpy==1.0", "pillow==1.0"])
    assert client.transforms.get(etl.name).transform == info
    assert text_of(node, info) == "red"
    # Again: nothing is resolved or built.
    WDTransform(client, paint, wd_decoder=None, verbose=True, packages=("colours < 2",))
    assert not any(line.startswith(("resolv", "built")) for line in capsys.readouterr().err.splitlines())


def test_the_nodes_own_packages_are_not_visible_inside(node: Served) -> None:
    info = node.register(LOOKING, decoder=None, packages=["colours"])
    assert text_of(node, info) == "colours cloudpickle"


def test_pictures_are_decoded_and_arrays_encoded_inside(node: Served, wheels: Path, shards: Path) -> None:
    import io

    import numpy as np
    import PIL.Image

    for path in wheels.glob("[np][ui]*.whl"):
        path.unlink()
    repack(wheels, "numpy", "pillow")
    stream = io.BytesIO()
    PIL.Image.new("RGB", (8, 4), "#102030").save(stream, "PNG")
    write_shard(shards / "p.tar", [{"png": stream.getvalue()}])
    source = """
        import colours
        import numpy as np

        def transform(sample):
            return {"__key__": sample["__key__"], "npy": np.asarray(sample["png"]) + 1, "txt": colours.NAME}
    """
    info = node.register(source, packages=["colours"])
    assert any(name.startswith("numpy==") and name != "numpy==1.0" for name in info.locked)
    found = members(node.get(info, "p.tar", ",seed=1").body)
    assert found["0000.txt"] == b"blue"
    assert (np.load(io.BytesIO(found["0000.npy"])) == [0x11, 0x21, 0x31]).all()


def test_other_packages_are_another_result_of_the_same_version(node: Served) -> None:
    found = {}
    for requirement in ("colours<2", "colours>=2"):
        info = node.register(PAINTING, decoder=None, packages=[requirement])
        node.get(info, SHARD, ",seed=1")
        answer = node.get(info, SHARD, ",seed=1")
        found[info.uuid, answer.headers["etag"], answer.headers["shardmill-origin"]] = set(
            members(answer.body).values()
        )
    assert len({uuid for uuid, _, _ in found}) == 1
    assert list(found.values()) == [{b"red"}, {b"blue"}]
    assert len({origin for _, _, origin in found}) == 2
    # The version is of one environment at a time.
    assert [info.transforms for name, info in environments(node).items() if name != "default"] == [[], [info.uuid]]


def test_environments_survive_the_node(start: Callable[..., Any]) -> None:
    with start() as served:
        info = served.register(PAINTING, decoder=None, packages=["colours"])
        before = served.get(info, SHARD, ",seed=1").headers["shardmill-origin"]
    with start() as served:
        answer = served.get(info, SHARD, ",seed=1")
        assert answer.headers["shardmill-origin"] == before
        assert set(members(answer.body).values()) == {b"blue"}
        assert info.environment in environments(served)
        assert served.register(PAINTING, decoder=None, packages=["colours"]).environment == info.environment


def test_an_environment_goes_when_nothing_needs_it(node: Served, client: Client) -> None:
    info = node.register(PAINTING, decoder=None, packages=["colours"])
    [built] = [found for found in client.transforms.environments() if found.packages is not None]
    assert built.name == info.environment
    assert built.transforms == [info.uuid]
    assert built.packages == info.locked
    assert built.bytes is not None
    assert built.bytes > 10_000
    with pytest.raises(Conflict, match=rf"{info.uuid} run in"):
        client.transforms.remove_environment(built.name)
    with pytest.raises(Conflict, match="given to the node"):
        client.transforms.remove_environment("default")
    with pytest.raises(NotFound, match="there is no environment 'other'"):
        client.transforms.remove_environment("other")
    client.transforms.remove(info.name)
    place = node.node.data / "packages" / "environments" / built.name
    assert place.is_dir()
    client.transforms.remove_environment(built.name)
    assert not place.exists()
    assert [found.name for found in client.transforms.environments()] == ["default"]


def test_what_was_removed_by_force_says_what_to_do(node: Served, client: Client) -> None:
    info = node.register(PAINTING, decoder=None, packages=["colours"])
    assert text_of(node, info) == "blue"
    client.transforms.remove_environment(info.environment, force=True)
    answer = node.get(info, SHARD, ",seed=2")
    assert (answer.status, answer.error.code) == (422, "environment_unfit")
    assert "register the transform again with its packages" in answer.error.message
    again = node.register(PAINTING, decoder=None, packages=["colours"])
    assert again.environment == info.environment
    assert text_of(node, info, ",seed=2") == "blue"


def test_what_somebody_changed_is_not_run(start: Callable[..., Any], tmp_path: Path) -> None:
    with start() as served:
        info = served.register(PAINTING, decoder=None, packages=["colours"])
    [module] = (tmp_path / "data" / "packages" / "environments" / info.environment).rglob("colours.py")
    module.chmod(0o644)
    module.write_text("NAME = 'grey'\n")
    with start() as served:
        answer = served.get(info, SHARD, ",seed=1")
        assert (answer.status, answer.error.code) == (422, "environment_unfit")
        assert "was changed since it was built" in answer.error.message
        served.register(PAINTING, decoder=None, packages=["colours"])
        assert text_of(served, info) == "blue"


def test_what_cannot_be_had_is_422_in_the_resolvers_words(node: Served, client: Client) -> None:
    with pytest.raises(EnvironmentUnfit, match=r"(?s)colors cannot be installed .* colors was not found"):
        WDTransform(client, paint, packages=["colors"])
    with pytest.raises(EnvironmentUnfit, match=r"imports colours, which packages numpy do not bring"):
        WDTransform(client, paint, packages=["numpy"])
    with pytest.raises(BadRequest, match="is not a requirement"):
        WDTransform(client, paint, packages=["./colours.whl"])
    request = msgspec.structs.replace(request_for(PAINTING), packages=["colours\n--index-url http://127.0.0.1"])
    answer = node.ask("POST", "/api/transforms", msgspec.json.encode(request))
    assert (answer.status, answer.error.code) == (400, "bad_request")
    request = msgspec.structs.replace(request_for(PAINTING), packages=["colours"])
    request = msgspec.structs.replace(request, code=msgspec.structs.replace(request.code, python="3.1"))
    answer = node.ask("POST", "/api/transforms", msgspec.json.encode(request))
    assert (answer.status, answer.error.code) == (422, "environment_unfit")
    assert "Start the node with --env NAME=/path/to/python3.1" in answer.error.message
    assert client.transforms.list() == []


def test_a_node_that_builds_nothing_says_so(start: Callable[..., Any]) -> None:
    with start(SHARDMILL_PACKAGES_POLICY="off") as served, Client(served.node.endpoint) as client:
        with pytest.raises(AccessDenied, match="builds no environments"):
            WDTransform(client, paint, packages=["colours"])


def test_a_client_that_leaves_leaves_nothing_half_made(node: Served, wheels: Path) -> None:
    write_wheel(wheels, "slow", "1.0", {f"slow/module_{number}.py": "x = 1\n" for number in range(1000)})
    request = msgspec.structs.replace(request_for(LOOKING, decoder=None), packages=["slow"])
    place = node.node.data / "packages" / "environments"
    with socket.create_connection(node.address, timeout=30) as connection:
        body = msgspec.json.encode(request)
        head = f"POST /api/transforms HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        received = b""
        while b"installing" not in received:
            received += connection.recv(4096)
    deadline = time.monotonic() + 20
    while list(place.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert environments(node).keys() == {"default"}
    assert node.register(LOOKING, decoder=None, packages=["slow"]).locked[-1] == "slow==1.0"


HOSTILE = '''
import os

def attempts(targets):
    """What can be done to files and directories that are not ours."""
    done = []
    def attempt(name, action):
        try:
            action()
        except OSError:
            return
        done.append(name)
    for target in targets:
        attempt("open " + target, lambda: os.close(os.open(target, os.O_WRONLY)) if os.path.isfile(target) else open(os.path.join(target, "new.py"), "w").close())
        attempt("chmod and open " + target, lambda: (os.chmod(target, 0o777), open(target if os.path.isfile(target) else os.path.join(target, "new.py"), "a").close()))
        attempt("remove " + target, lambda: os.remove(target) if os.path.isfile(target) else os.rename(target, target + "-moved"))
        attempt("link " + target, lambda: os.link(target, "linked"))
    return done
'''
HOSTILE_FUNCTION = (
    HOSTILE
    + """
def transform(sample):
    sample["txt"] = " ".join(attempts(TARGETS) + evil.DONE + __import__("builtins").done_at_start) or "nothing"
    return sample
"""
)


def test_neither_a_function_nor_what_it_imports_changes_what_is_installed(
    start: Callable[..., Any], wheels: Path, tmp_path: Path
) -> None:
    packages = tmp_path / "data" / "packages"
    with start() as served:
        other = served.register(PAINTING, decoder=None, name="other", packages=["colours"])
        assert text_of(served, other) == "blue"
        [module] = (packages / "environments" / other.environment).rglob("colours.py")
        cached = next(path for path in (packages / "cache").rglob("*") if path.is_file())
        # Without the layer it would all be done, and no node would be left to ask; that it lacks is what the node says.
        isolation = msgspec.json.decode(served.ask("GET", "/api/config").body)["isolation"]
        has_layer = landlock_version() >= 3
        assert isolation["read_only_files"] is has_layer
        places = (module, module.parent, cached, cached.parent, packages / "environments")
        targets = [str(path) for path in places] if has_layer else []
        # As it is imported, and even as the interpreter starts: a path file runs without an import.
        evil = f"{HOSTILE}\nDONE = attempts({targets!r})\n"
        lines = "import evil; import builtins; builtins.done_at_start = evil.DONE\n"
        write_wheel(wheels, "evil", "1.0", {"evil.py": evil, "evil.pth": lines})
        source = f"import evil\nTARGETS = {targets!r}\n{HOSTILE_FUNCTION}"
        info = served.register(source, decoder=None, packages=["evil"])
        own = [str(path) for path in (packages / "environments" / info.environment).rglob("evil.py")]
        assert own
        assert text_of(served, info) == "nothing"
        assert module.read_text() == "NAME = 'blue'\n"
        assert text_of(served, other, ",seed=9") == "blue"


def test_a_node_keeps_few_built_environments_running(start: Callable[..., Any], wheels: Path) -> None:
    from shardmill.etl.environments.environments import RUNNING

    names = [f"one-{number}" for number in range(RUNNING + 2)]
    for name in names:
        write_wheel(wheels, name.replace("-", "_"), "1.0", {f"{name.replace('-', '_')}.py": ""})
    with start(SHARDMILL_TRANSFORMS_IDLE_WORKERS="100ms") as served:
        infos = [served.register(LOOKING, decoder=None, name=name, packages=[name]) for name in names]
        deadline = time.monotonic() + 20
        while True:
            running = [one for one in environments(served).values() if one.state == "warm" and one.packages is not None]
            if len(running) <= RUNNING + 1:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert text_of(served, infos[0]) == "cloudpickle"
