"""Which credentials are taken, in the vendors' own order, and what is said when there are none."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from shardmill.config import BucketSettings, OriginSettings
from shardmill.core.errors import BackendDenied, BadRequest
from shardmill.core.values import Secret
from shardmill.storage.origins import open_origin
from shardmill.storage.origins.credentials import (
    AmbientKeys,
    Credentials,
    Surroundings,
    find_azure,
    find_gcs,
    find_s3,
)
from shardmill.testing.faults import Fault, FaultServer, fault_server
from shardmill.testing.origins import page_of, read
from tests.storage.origins.support import CLOUDS, NOWHERE, QUICK, Dialect, opened

NOTHING: dict[str, Any] = {
    "access_key_id": "",
    "secret_access_key": Secret(),
    "token": Secret(),
    "account_key": Secret(),
}
NOT_A_CLOUD = "acme corporation"


def s3(
    home: Path = NOWHERE, environ: dict[str, str] | None = None, vendor: str = NOT_A_CLOUD, **options: Any
) -> Credentials:
    return find_s3(BucketSettings("s3://b", "s3://b", **options), Surroundings(environ or {}, home, vendor))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = of-default\naws_secret_access_key = s1\n\n"
        "[team]\naws_access_key_id = of-team\naws_secret_access_key = s%2\naws_session_token = t2\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile team]\nregion = eu-central-1\n"
        "[profile sso]\nsso_session = corp\n[profile role]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = default\n"
        "[profile inline]\naws_access_key_id = of-inline\naws_secret_access_key = s3\n"
    )
    return tmp_path


def test_a_key_of_the_settings_comes_before_all_others(home: Path) -> None:
    found = s3(
        home,
        {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "x"},
        access_key_id="own",
        secret_access_key=Secret("s"),
    )
    assert found.key is not None
    assert (found.kind, found.key.name, found.key.token) == ("given", "own", "")
    assert "access_key_id of the bucket's settings (in use)" in found.tried


def test_the_environment_comes_before_files(home: Path) -> None:
    environ = {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "t", "AWS_REGION": "r"}
    found = s3(home, environ)
    assert found.key is not None
    assert (found.key.name, found.key.token, found.region) == ("env", "t", "r")
    assert "AWS_ACCESS_KEY_ID of the environment (in use)" in found.tried


@pytest.mark.parametrize(
    ("profile", "environ", "name", "region"),
    [
        ("", {}, "of-default", "eu-west-1"),
        ("team", {}, "of-team", "eu-central-1"),
        ("", {"AWS_PROFILE": "team"}, "of-team", "eu-central-1"),
        ("inline", {}, "of-inline", "us-east-1"),
        (
            "team",
            {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "r"},
            "of-team",
            "eu-central-1",
        ),
    ],
)
def test_profiles_are_read_as_the_tools_of_aws_read_them(
    home: Path, profile: str, environ: dict[str, str], name: str, region: str
) -> None:
    found = s3(home, environ, profile=profile)
    assert found.key is not None
    assert (found.key.name, found.region) == (name, region)


def test_a_named_source_that_does_not_serve_is_not_made_up_for_by_another(home: Path) -> None:
    environ = {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "x"}
    for profile, why in (("none", "no such profile"), ("sso", "needs sso_session"), ("role", "needs role_arn")):
        found = s3(home, environ, vendor="amazon ec2", profile=profile)
        assert found.kind == "none"
        assert why in found.tried


def test_keys_that_are_rotated_are_read_again(home: Path) -> None:
    keys = AmbientKeys(BucketSettings("s3://b", "s3://b"), Surroundings({}, home, NOT_A_CLOUD))
    (home / ".aws" / "credentials").write_text("[default]\naws_access_key_id = new\naws_secret_access_key = s\n")
    before = keys.current().key
    keys.reread()
    now = keys.current().key
    assert before is not None
    assert now is not None
    assert (before.name, now.name) == ("of-default", "new")


@pytest.mark.parametrize(
    "variable",
    ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"],
)
def test_identities_of_workloads_are_the_librarys_to_fetch(variable: str) -> None:
    found = s3(environ={variable: "/there"})
    assert found.kind == "library"
    assert f"{variable} (in use)" in found.tried


def test_a_metadata_service_is_asked_on_its_own_cloud_only() -> None:
    assert s3().kind == "none"
    assert s3(vendor="amazon ec2").kind == "library"
    assert s3(vendor="google").kind == "none"
    assert s3(vendor="amazon ec2", environ={"AWS_EC2_METADATA_DISABLED": "true"}).kind == "none"
    assert s3(vendor="amazon ec2", use_metadata=False).kind == "none"
    assert s3(use_metadata=True).kind == "library"
    for vendor, environ, kind in (
        ("google", {}, "library"),
        (NOT_A_CLOUD, {"GCE_METADATA_HOST": "h"}, "library"),
        (NOT_A_CLOUD, {}, "none"),
    ):
        gcs = find_gcs(BucketSettings("gs://b", "gs://b"), Surroundings(environ, NOWHERE, vendor))
        assert gcs.kind == kind
    for vendor, kind in (("microsoft corporation", "library"), ("amazon", "none")):
        azure = find_azure(BucketSettings("az://b", "az://b"), Surroundings({}, NOWHERE, vendor))
        assert azure.kind == kind


def test_googles_files_are_found_where_its_tools_put_them(tmp_path: Path) -> None:
    settings = BucketSettings("gs://b", "gs://b")
    login = tmp_path / ".config" / "gcloud" / "application_default_credentials.json"
    login.parent.mkdir(parents=True)
    login.write_text("{}")
    other = tmp_path / "key.json"
    other.write_text("{}")
    assert find_gcs(settings, Surroundings({}, tmp_path, NOT_A_CLOUD)).file == login
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": str(other)}
    assert find_gcs(settings, Surroundings(environ, tmp_path, NOT_A_CLOUD)).file == other
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "none")}
    found = find_gcs(settings, Surroundings(environ, tmp_path, "google"))
    assert found.kind == "none"
    assert "GOOGLE_APPLICATION_CREDENTIALS names (no such file)" in found.tried


def test_what_is_tried_has_no_secrets_and_no_paths(home: Path) -> None:
    for found in (s3(home), s3(home, profile="team"), s3(environ={"AWS_WEB_IDENTITY_TOKEN_FILE": str(home)})):
        assert str(home) not in found.tried
        assert "s%2" not in found.tried
        assert "s%2" not in repr(found)


@pytest.mark.parametrize("dialect", CLOUDS)
def test_without_credentials_nobody_is_asked_and_the_way_out_is_named(dialect: Dialect) -> None:
    async def story() -> None:
        with fault_server() as server:
            async with opened(dialect, server, use_metadata=False, **NOTHING) as origin:
                for call in (origin.head("object"), read(origin, "object"), page_of(origin)):
                    with pytest.raises(BackendDenied) as caught:
                        await call
                    assert "credentials tried: " in str(caught.value)
                    assert "metadata service (use_metadata = false)" in str(caught.value)
                    assert "anonymous = true" in str(caught.value)
            assert server.requests == []

    asyncio.run(story())


@pytest.mark.parametrize("dialect", CLOUDS)
def test_public_buckets_are_asked_without_a_signature(dialect: Dialect) -> None:
    async def story() -> None:
        with fault_server() as server:
            server.put("/bucket/object", b"x")
            async with opened(dialect, server, anonymous=True, **NOTHING) as origin:
                assert (await read(origin, "object"))[0] == b"x"
                assert [meta.key for meta in (await page_of(origin)).objects] == ["object"]
            assert all("authorization" not in request.headers for request in server.requests)

    asyncio.run(story())


def test_a_refusal_says_which_credentials_were_refused(home: Path) -> None:
    async def story() -> None:
        with fault_server() as server:
            server.misbehave("*", Fault("status", status=403, methods=("GET", "HEAD")))
            settings = BucketSettings("s3://bucket", "s3://bucket", endpoint=server.endpoint, profile="team")
            async with open_origin(settings, QUICK, environ={}, home=home) as origin:
                for call in (origin.head("object"), read(origin, "object"), page_of(origin)):
                    with pytest.raises(BackendDenied) as caught:
                        await call
                    assert "profile 'team' of the credentials file (in use)" in str(caught.value)

    asyncio.run(story())


def test_who_pays_is_said_in_every_request() -> None:
    async def story() -> None:
        with fault_server() as server:
            server.put("/bucket/object", b"x")
            async with opened("s3", server, requester_pays=True) as origin:
                await read(origin, "object")
                await origin.head("object")
                await page_of(origin)
            assert {request.headers.get("x-amz-request-payer") for request in server.requests} == {"requester"}

    asyncio.run(story())


def test_no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def story(server: FaultServer) -> None:
        async with opened("az", server, account_key=Secret(), sas_token=Secret("sv=2022&sig=hunter2%3D")) as origin:
            with pytest.raises(BackendDenied):
                await read(origin, "object")
        async with opened("s3", server, secret_access_key=Secret("hunter2")) as origin:
            with pytest.raises(BackendDenied):
                await read(origin, "object")
        assert any("sig=hunter2" in request.target for request in server.requests)

    with caplog.at_level(logging.DEBUG, "shardmill"), fault_server() as server:
        server.misbehave("*", Fault("status", status=403))
        asyncio.run(story(server))
    assert caplog.records
    assert "hunter2" not in caplog.text


def test_azure_needs_an_account() -> None:
    async def story() -> None:
        with pytest.raises(BadRequest, match="which storage account"):
            async with open_origin(BucketSettings("az://b", "az://b"), OriginSettings(), environ={}, home=NOWHERE):
                pass

    asyncio.run(story())


def test_a_key_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        file = tmp_path / "key.json"
        file.write_text('{"type": "none of these"}')
        settings = BucketSettings("gs://bucket", "gs://bucket", credentials_file=file)
        with pytest.raises(BadRequest, match="settings cannot be used"):
            async with open_origin(settings, OriginSettings(), environ={}, home=NOWHERE):
                pass

    asyncio.run(story())
