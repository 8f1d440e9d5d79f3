"""The effective configuration as `/api/config` shows it."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from shardmill.config import SECTIONS, BucketSettings, Config, load_config
from shardmill.core.values import Secret
from shardmill.node.settings import masked_settings


def test_the_shown_settings_are_all_of_them_in_plain_json(tmp_path: Path) -> None:
    config = load_config(
        environ={},
        flags={"server": {"hosts": "a.example", "data": str(tmp_path)}},
        buckets=[f"gs://imgs=dir:{tmp_path}"],
        environments=[f"torch={sys.executable}"],
    )
    shown: dict[str, Any] = masked_settings(config)
    assert json.loads(json.dumps(shown)) == shown
    for section, settings in SECTIONS.items():
        assert list(shown[section]) == [item.name for item in dataclasses.fields(settings)]
    assert shown["server"]["hosts"] == ["a.example"]
    assert shown["server"]["data"] == str(tmp_path)
    assert shown["server"]["tls_key"] is None
    assert shown["storage"]["max_object"] == 1 << 40
    assert shown["server"]["drain"] == 30.0
    (bucket,) = shown["buckets"]
    assert list(bucket) == [item.name for item in dataclasses.fields(BucketSettings)]
    assert (bucket["uri"], bucket["backing"], bucket["writable"]) == ("gs://imgs", f"dir:{tmp_path}", None)
    assert shown["environments"] == [{"name": "torch", "python": sys.executable}]


def test_credentials_of_a_package_index_are_not_shown() -> None:
    environ = {
        "SHARDMILL_PACKAGES_INDEX_URL": "https://user:hunter2@packages.example/simple",
        "SHARDMILL_PACKAGES_EXTRA_INDEX_URLS": "https://token@other.example/simple,https://plain.example",
    }
    shown: dict[str, Any] = masked_settings(load_config(environ=environ))
    assert shown["packages"]["index_url"] == "https://***@packages.example/simple"
    assert shown["packages"]["extra_index_urls"] == ["https://***@other.example/simple", "https://plain.example"]


def test_secrets_of_buckets_are_not_shown() -> None:
    secrets = [item.name for item in dataclasses.fields(BucketSettings) if isinstance(item.default, Secret)]
    assert {"secret_access_key", "session_token", "account_key", "sas_token", "token"} == set(secrets)
    given: dict[str, Any] = dict.fromkeys(secrets, Secret("hunter2"))
    settings = BucketSettings("s3://imgs", "s3://imgs", access_key_id="name", **given)
    shown: dict[str, Any] = masked_settings(Config(buckets=(settings, BucketSettings("s3://b", "s3://b"))))
    assert "hunter2" not in json.dumps(shown)
    assert "hunter2" not in repr(settings)
    assert [shown["buckets"][0][name] for name in secrets] == ["***"] * len(secrets)
    assert [shown["buckets"][1][name] for name in secrets] == [""] * len(secrets)
    assert shown["buckets"][0]["access_key_id"] == "name"
