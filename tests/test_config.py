"""Settings: file < environment < flags, and everything that is wrong with them at once."""

import dataclasses
import json
import math
import os
import re
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.config import (
    SECTIONS,
    BucketSettings,
    Config,
    ConfigError,
    EnvironmentSettings,
    available_cores,
    is_loopback,
    load_config,
    parse_value,
)
from shardmill.core.refs import Bucket
from shardmill.core.values import Seconds, Size

EVERY = [
    (section, item)
    for section, settings in {**SECTIONS, "bucket": BucketSettings, "env": EnvironmentSettings}.items()
    for item in dataclasses.fields(settings)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shardmill.toml"


def problems_of(file: Path | None = None, **given: Any) -> list[str]:
    """What is found wrong."""
    with pytest.raises(ConfigError) as refused:
        load_config(file, **{"environ": {}, **given})
    assert str(refused.value) == "\n".join(refused.value.problems)
    return refused.value.problems


def test_nothing_given_is_the_defaults() -> None:
    config = load_config(environ={})
    data = config.server.data
    assert config == Config(server=dataclasses.replace(Config().server, data=data))
    assert data.is_absolute()
    assert data.name == "shardmill"
    assert is_loopback(config.server.address[0])


def test_the_data_directory_follows_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_config(environ={}).server.data == tmp_path / "shardmill"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(environ={}).server.data == tmp_path / ".local/share/shardmill"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(file: Path) -> None:
    file.write_text('[storage]\nthreads = 3\nmax_object = "1GB"\nlinks = "follow"\n[server]\nidle_timeout = "2m"\n')
    environ = {"SHARDMILL_STORAGE_THREADS": "4", "SHARDMILL_STORAGE_MAX_OBJECT": "2GB", "PATH": "/bin"}
    config = load_config(file, environ=environ, flags={"storage": {"threads": 5, "max_object": None}})
    assert config.storage.threads == 5
    assert config.storage.max_object == 2_000_000_000
    assert config.storage.links == "follow"
    assert config.server.idle_timeout == 120.0
    assert config.storage.durability == "power"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_can_be_given_in_each_of_the_three_ways(section: str, tmp_path: Path, file: Path) -> None:
    texts: dict[Any, str] = {Size: "3MiB", Seconds: "3s", int: "3", bool: "true", Path: str(tmp_path / "x")}
    special = {"listen": "127.0.0.1:3", "log_level": "debug", "find_links": str(tmp_path)}
    kinds = typing.get_type_hints(SECTIONS[section])
    values = {}
    for item in dataclasses.fields(SECTIONS[section]):
        kind = kinds[item.name]
        if typing.get_origin(kind) is typing.Literal:
            values[item.name] = next(choice for choice in typing.get_args(kind) if choice != item.default)
            continue
        plain = next((arg for arg in typing.get_args(kind) if arg is not type(None) and arg is not Ellipsis), kind)
        values[item.name] = special.get(item.name) or texts.get(plain, "some.host")
    for path in (values.get("tls_cert"), values.get("tls_key")):
        if path is not None:
            Path(path).touch()
    file.write_text(f"[{section}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    by_file = load_config(file, environ={})
    by_environment = load_config(
        environ={f"SHARDMILL_{section.upper()}_{name.upper()}": value for name, value in values.items()}
    )
    by_flag = load_config(environ={}, flags={section: values})
    assert by_file == by_environment == by_flag
    default = getattr(load_config(environ={}), section)
    unchanged = [name for name in values if getattr(getattr(by_file, section), name) == getattr(default, name)]
    assert unchanged == []


@pytest.mark.parametrize(("section", "item"), EVERY, ids=lambda part: getattr(part, "name", part))
def test_every_setting_says_what_it_is(section: str, item: "dataclasses.Field[Any]") -> None:
    assert re.fullmatch(r"[A-Za-z`0-9].*\.", item.metadata["doc"])
    assert item.default is not dataclasses.MISSING


def test_all_problems_are_told_at_once(file: Path, tmp_path: Path) -> None:
    file.write_text(
        '[server]\nlisten = "nowhere"\nlog_level = "loud"\ncolour = 1\n'
        '[storage]\nthreads = "many"\ndurability = "perhaps"\n'
        '[transforms]\nmemory = "big"\nsample_timeout = "soon"\n'
        "[stroage]\nthreads = 1\n"
        '[[bucket]]\nuri = "ht://photos"\nbaking = "pool"\n'
        '[[env]]\nname = "Bad Name"\npython = "/nonexistent"\n'
    )
    problems = problems_of(
        file,
        environ={"SHARDMILL_STORAGE_THREADS": "-1", "SHARDMILL_SERVER_COLOR": "1"},
        flags={"server": {"tls_cert": str(tmp_path / "none.pem"), "drain": "later"}},
        buckets=["photos=pool", f"gs://dir=dir:{tmp_path}/none", "gs://odd=tape"],
        environments=["torch", "torch=/nonexistent"],
    )
    expected = [
        f"{file}: server.colour: unknown setting; known: body_timeout",
        f"{file}: storage.threads: 'many' is not a whole number",
        f"{file}: storage.durability: 'perhaps' is not one of power, kill",
        f"{file}: transforms.memory: 'big' is not a size",
        f"{file}: transforms.sample_timeout: 'soon' is not a duration",
        f"{file}: bucket 1: baking: unknown setting; known: access_key_id, account, ",
        f"{file}: unknown section 'stroage'; known: {', '.join(SECTIONS)}, bucket, env",
        "SHARDMILL_SERVER_COLOR: unknown setting",
        "SHARDMILL_STORAGE_THREADS: '-1' is not a whole number",
        "--drain: 'later' is not a duration",
        "--env 'torch': write NAME=/path/to/python",
        "bucket ht://photos: which web server?",
        "bucket 'photos' has no provider",
        "bucket gs://odd: unknown backing 'tape'",
        "environment 'Bad Name': bad name",
        "environment 'torch': /nonexistent is not an interpreter",
        "listen 'nowhere': write HOST:PORT",
        "tls: --tls-cert and --tls-key go together",
        "log_level 'loud' is not one of",
    ]
    missing = [text for text in expected if not any(text in problem for problem in problems)]
    assert missing == []
    assert any(f"{tmp_path}/none is not a directory" in problem for problem in problems)
    assert any("none.pem does not exist" in problem for problem in problems)
    assert len(problems) == len(expected) + 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[server\n", "Expected ']'"),
        ("server = 5\n", "[server] is not a table"),
        ("bucket = 5\n", "write it as [[bucket]]"),
        ("[bucket]\nuri = 'gs://x'\n", "write it as [[bucket]]"),
        ("bucket = [5]\n", "write it as [[bucket]]"),
        ("[[bucket]]\nbacking = 'pool'\n", "bucket '': "),
        ("[server]\nhosts = 5\n", "server.hosts: 5 is not a list"),
        ("[server]\nhosts = [5]\n", "server.hosts: [5] is not a list"),
        ("[server]\nlisten = 5\n", "server.listen: 5 is not text"),
        ("[server]\ndata = true\n", "server.data: True is not a path"),
        ("[server]\ninsecure_no_auth = 'maybe'\n", "is not true or false"),
        ("[storage]\nthreads = 2.5\n", "is not a whole number"),
        ("[storage]\nthreads = true\n", "is not a whole number"),
        ("[storage]\nthreads = 0\n", "threads 0: at least 1"),
        ("[server]\nmax_connections = 0\n", "max_connections 0: at least 1"),
        ("[transforms]\nmax_runs = 0\n", "max_runs 0: at least 1"),
        ("[storage]\nmax_object = true\n", "is not a size"),
        ("[storage]\nmax_object = -1\n", "is not a size"),
        ("[server]\ndrain = nan\n", "is not a duration"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_place(file: Path, text: str, reason: str) -> None:
    file.write_text(text)
    problems = problems_of(file)
    assert len(problems) == 1
    assert reason in problems[0]
    assert str(file) in problems[0] or "at least" in problems[0] or problems[0].startswith("bucket ''")


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, file: Path) -> None:
    assert problems_of(tmp_path / "none.toml") == [f"{tmp_path / 'none.toml'}: No such file or directory"]
    assert problems_of(tmp_path) == [f"{tmp_path}: Is a directory"]
    file.write_bytes(b"\xff\xfe")
    assert "utf-8" in problems_of(file)[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("5", 5),
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1GB", 10**9),
        ("1.5k", 1500),
        ("2Ti", 2 << 40),
        ("7b", 7),
    ],
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert parse_value(Size, text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("1.5", 1.5), ("500ms", 0.5), ("5m", 300.0), ("2 h", 7200.0), ("1d", 86400.0)]
)
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_value(Seconds, text) == seconds


@given(st.text(max_size=20) | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_any_value_is_a_setting_or_refused(value: Any) -> None:
    for kind in (Size, Seconds, int, bool, str, Path, tuple[str, ...], typing.Literal["power", "kill"], Path | None):
        try:
            parsed = parse_value(kind, value)
        except ValueError:
            continue
        assert not isinstance(parsed, float) or (math.isfinite(parsed) and parsed >= 0)
        assert not isinstance(parsed, int) or parsed >= 0


def test_host_names_are_a_list_or_parted_by_commas(file: Path) -> None:
    file.write_text('[server]\nhosts = ["a.example", "b.example"]\n')
    assert load_config(file, environ={}).server.hosts == ("a.example", "b.example")
    environ = {"SHARDMILL_SERVER_HOSTS": "a.example, b.example,"}
    assert load_config(environ=environ).server.hosts == ("a.example", "b.example")


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        (":80", ("127.0.0.1", 80)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:443", ("::1", 443)),
        ("127.8.9.1:65535", ("127.8.9.1", 65535)),
    ],
)
def test_an_address_of_this_machine_needs_no_credentials(listen: str, address: tuple[str, int]) -> None:
    assert load_config(environ={}, flags={"server": {"listen": listen}}).server.address == address


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:80", "[::]:80", "10.0.0.1:80", "example.com:80", "localhost.example.com:80"]
)
def test_another_address_is_refused_unless_that_is_said(listen: str) -> None:
    assert "--insecure-no-auth" in problems_of(flags={"server": {"listen": listen}})[0]
    config = load_config(environ={}, flags={"server": {"listen": listen, "insecure_no_auth": True}})
    assert config.server.listen == listen


@pytest.mark.parametrize("listen", ["", "80.80", "host:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:x"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    assert problems_of(flags={"server": {"listen": listen}}) == [f"listen {listen!r}: write HOST:PORT"]


def test_buckets_of_flags_stand_in_place_of_the_files(file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    file.write_text(f'[[bucket]]\nuri = "gcp://imgs"\nbacking = "dir:{tmp_path}/one"\n[[bucket]]\nuri = "ais://pool"\n')
    config = load_config(file, environ={}, buckets=[f"gs://imgs=dir-rw:{tmp_path}/two", "s3://store=pool"])
    found = {settings.uri: settings for settings in config.buckets}
    assert list(found) == ["gs://imgs", "ais://pool", "s3://store"]
    assert found["gs://imgs"].directory == tmp_path / "two"
    assert found["gs://imgs"].is_writable
    assert found["gs://imgs"].bucket == Bucket.of("gs", "imgs")
    assert found["ais://pool"].directory is None
    assert found["ais://pool"].is_writable
    assert found["s3://store"].backing == "pool"
    (settings,) = load_config(environ={}, buckets=[f"gs://imgs=dir:{tmp_path}/one"]).buckets
    assert not settings.is_writable


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('backing = "ftp://host"', "unknown backing 'ftp://host'; write s3://, gs://, az:// or https://HOST/PATH"),
        ('backing = "s3://imgs/train"', "'s3://imgs/train' has a path; name it as prefix"),
        ('backing = "https:///x"', "'https:///x' names no host"),
        ('access_key_id = "k"', "access_key_id and secret_access_key go together"),
        ('anonymous = true\nsas_token = "t"', "anonymous and credentials exclude each other"),
        ('endpoint = "localhost:9000"', "endpoint 'localhost:9000' is not a URL such as https://HOST"),
        ('credentials_file = "/nonexistent/file"', "credentials_file /nonexistent/file does not exist"),
        ('backing = "pool"\nprefix = "a/"\nregion = "x"', "prefix, region: only remote stores have these"),
        ("secret_access_key = 5", "bucket 1: secret_access_key: the value is not text"),
    ],
)
def test_a_remote_bucket_with_a_mistake_is_refused(file: Path, table: str, problem: str) -> None:
    file.write_text(f'[[bucket]]\nuri = "s3://imgs"\n{table}\n')
    assert problem in problems_of(file)[0]


def test_a_bucket_of_a_web_server_needs_its_url() -> None:
    assert problems_of(buckets=["ht://site"]) == [
        "bucket ht://site: which web server? give its URL: ht://site=https://HOST/PATH"
    ]


def test_what_is_behind_a_bucket_decides_whether_it_can_be_written_to() -> None:
    writable = {
        backing: BucketSettings("s3://b", backing).is_writable for backing in ("pool", "dir:x", "dir-rw:x", "s3://b")
    }
    assert writable == {"pool": True, "dir:x": False, "dir-rw:x": True, "s3://b": False}
    assert BucketSettings("s3://b", "s3://b", writable=True).is_writable
    assert not BucketSettings("s3://b", "pool", writable=False).is_writable
    assert BucketSettings("s3://b", "gs://other").is_remote
    assert not BucketSettings("s3://b", "dir:x").is_remote


def test_a_directory_bucket_names_its_directory() -> None:
    """Nothing behind the colon would be the directory that the node happens to be started in."""
    for backing in ("dir:", "dir-rw:"):
        assert problems_of(buckets=[f"gs://imgs={backing}"]) == [
            f"bucket gs://imgs: {backing!r} names no directory; write {backing}PATH"
        ]
    assert "is not a directory" in problems_of(buckets=["gs://imgs=dir:~nobody-of-that-name/imgs"])[0]


def test_an_environment_is_an_interpreter_with_a_name(tmp_path: Path) -> None:
    (settings,) = load_config(environ={}, environments=[f"torch={sys.executable}"]).environments
    assert (settings.name, settings.python) == ("torch", Path(sys.executable))
    for python in (tmp_path, __file__, "~nobody-of-that-name/python"):
        assert "is not an interpreter" in problems_of(environments=[f"torch={python}"])[0]


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= available_cores() <= 4096
    assert load_config(environ={}).transforms.worker_count == available_cores()
    assert load_config(environ={}, flags={"transforms": {"workers": 3}}).transforms.worker_count == 3


def test_commands_are_looked_up_where_the_node_itself_looks() -> None:
    assert load_config(environ={"PATH": "/opt/bin:/bin"}).transforms.commands == "/opt/bin:/bin"
    assert load_config(environ={}).transforms.commands == os.defpath
    given = {"PATH": "/opt/bin", "SHARDMILL_TRANSFORMS_COMMAND_PATH": "/srv/bin"}
    assert load_config(environ=given).transforms.commands == "/srv/bin"


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ('policy = "allow-list"', 'packages: policy = "allow-list" and the names in allow go together'),
        ('allow = ["numpy"]', 'packages: policy = "allow-list" and the names in allow go together'),
        ("no_index = true", "packages: no_index leaves nothing but find_links, and that is empty"),
        ('find_links = ["/nonexistent/wheels"]', "packages.find_links /nonexistent/wheels: is neither a URL nor a dir"),
        ("timeout = 0", "packages.timeout 0.0: at least 1 is needed"),
    ],
)
def test_settings_of_packages_that_contradict_each_other(file: Path, packages: str, reason: str) -> None:
    file.write_text(f"[packages]\n{packages}\n")
    [problem] = problems_of(file)
    assert reason in problem


def test_names_of_environments_that_the_node_builds_are_its_own() -> None:
    [problem] = problems_of(environments=[f"packages-mine={sys.executable}"])
    assert "packages-… are those that the node builds itself" in problem
