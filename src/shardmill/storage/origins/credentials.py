"""Where credentials come from, and what to say when they do not suffice.

The order is that of the vendors' own tools: the bucket's settings, the environment, files, then identities that only
the library behind the stores can fetch (web identity, containers, the machine's metadata service). The metadata
service is asked only on machines of that very cloud: elsewhere its address may be anybody's.
"""

import configparser
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardmill.config import BucketSettings
from shardmill.core.values import Secret
from shardmill.storage.origins.sigv4 import AccessKey

REREAD_SECONDS = 60.0  # files and their keys are rotated under a running node

Kind = Literal["given", "anonymous", "library", "none"]
"""`given`: known here; `library`: an identity that the library fetches; `none`: nothing to sign with."""

_VENDOR_FILES = tuple(Path("/sys/class/dmi/id") / name for name in ("sys_vendor", "product_name", "bios_vendor"))
_VENDORS = {"s3": "amazon", "gs": "google", "az": "microsoft corporation"}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What ambient credentials are found in."""

    environ: Mapping[str, str]
    home: Path
    vendor: str
    """Of this machine, in lower case, as its firmware tells it."""

    @classmethod
    def look(cls, environ: Mapping[str, str], home: Path) -> "Surroundings":
        found = []
        for path in _VENDOR_FILES:
            try:
                found.append(path.read_text(errors="replace").strip().lower())
            except OSError:
                continue
        return cls(environ, home, " ".join(found))


@dataclass(frozen=True, slots=True)
class Credentials:
    """What was found for one bucket."""

    kind: Kind
    tried: str
    """A sentence for who is refused: the sources in their order, and which one is in use. Without secrets or paths."""
    key: AccessKey | None = None
    """S3 only, if `given`."""
    region: str = ""
    """S3 only."""
    file: Path | None = None
    """GCS only, if `given` by a file."""


class _Trail:
    """The sources as they are tried."""

    def __init__(self) -> None:
        self._steps: list[str] = []

    def miss(self, source: str, why: str) -> None:
        self._steps.append(f"{source} ({why})")

    def told(self, used: str | None) -> str:
        steps = [*self._steps, *([f"{used} (in use)"] if used else [])]
        return f"credentials tried: {', '.join(steps)}"


class AmbientKeys:
    """Credentials of an S3 bucket, read again from time to time."""

    def __init__(self, settings: BucketSettings, surroundings: Surroundings) -> None:
        self._settings = settings
        self._surroundings = surroundings
        self._found = find_s3(settings, surroundings)
        self._read = time.monotonic()

    def current(self) -> Credentials:
        if time.monotonic() - self._read > REREAD_SECONDS:
            self.reread()
        return self._found

    def reread(self) -> None:
        self._found = find_s3(self._settings, self._surroundings)
        self._read = time.monotonic()


def find_s3(settings: BucketSettings, surroundings: Surroundings) -> Credentials:
    """Credentials for S3 and its like."""
    environ, trail = surroundings.environ, _Trail()
    profile = settings.profile or environ.get("AWS_PROFILE", "default")
    files = _read_profile(settings, surroundings, profile)
    region = (
        settings.region
        or (files.region if settings.profile else "")
        or environ.get("AWS_REGION")
        or environ.get("AWS_DEFAULT_REGION")
        or files.region
        or "us-east-1"
    )
    if settings.anonymous:
        return Credentials("anonymous", "credentials: none, since anonymous = true", region=region)
    if settings.access_key_id:
        key = AccessKey(settings.access_key_id, settings.secret_access_key, settings.session_token)
        return Credentials("given", trail.told("access_key_id of the bucket's settings"), key, region)
    trail.miss("access_key_id of the bucket's settings", "not set")
    if not settings.profile and not settings.credentials_file:
        name, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
        if name and secret:
            key = AccessKey(name, Secret(secret), Secret(environ.get("AWS_SESSION_TOKEN", "")))
            return Credentials("given", trail.told("AWS_ACCESS_KEY_ID of the environment"), key, region)
        trail.miss("AWS_ACCESS_KEY_ID of the environment", "not set")
    source = f"profile {profile!r} of the credentials file"
    if files.key is not None:
        return Credentials("given", trail.told(source), files.key, region)
    trail.miss(source, files.why)
    if settings.profile or settings.credentials_file:
        # Whoever names a source means no other.
        return Credentials("none", trail.told(None), region=region)
    for source, variable in (
        ("web identity", "AWS_WEB_IDENTITY_TOKEN_FILE"),
        ("container credentials", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
        ("container credentials", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    ):
        if environ.get(variable):
            return Credentials("library", trail.told(f"{source} of {variable}"), region=region)
        trail.miss(f"{source} of {variable}", "not set")
    kind, told = _metadata(settings, surroundings, trail, "s3")
    return Credentials(kind, told, region=region)


def find_gcs(settings: BucketSettings, surroundings: Surroundings) -> Credentials:
    """Credentials for Google Cloud Storage."""
    environ, trail = surroundings.environ, _Trail()
    if settings.anonymous:
        return Credentials("anonymous", "credentials: none, since anonymous = true")
    if settings.token:
        return Credentials("given", trail.told("token of the bucket's settings"))
    trail.miss("token of the bucket's settings", "not set")
    if settings.credentials_file is not None:
        told = trail.told("credentials_file of the bucket's settings")
        return Credentials("given", told, file=settings.credentials_file)
    trail.miss("credentials_file of the bucket's settings", "not set")
    if named := environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        file = Path(named)
        if file.is_file():
            told = trail.told("the file that GOOGLE_APPLICATION_CREDENTIALS names")
            return Credentials("given", told, file=file)
        trail.miss("the file that GOOGLE_APPLICATION_CREDENTIALS names", "no such file")
        return Credentials("none", trail.told(None))
    trail.miss("GOOGLE_APPLICATION_CREDENTIALS", "not set")
    ambient = surroundings.home / ".config" / "gcloud" / "application_default_credentials.json"
    if ambient.is_file():
        told = trail.told("the login of `gcloud auth application-default login`")
        return Credentials("given", told, file=ambient)
    trail.miss("the login of `gcloud auth application-default login`", "none")
    return Credentials(*_metadata(settings, surroundings, trail, "gs"))


def find_azure(settings: BucketSettings, surroundings: Surroundings) -> Credentials:
    """Credentials for Azure Blob Storage."""
    environ, trail = surroundings.environ, _Trail()
    if settings.anonymous:
        return Credentials("anonymous", "credentials: none, since anonymous = true")
    for name, value in (("account_key", settings.account_key), ("sas_token", settings.sas_token)):
        if value:
            return Credentials("given", trail.told(f"{name} of the bucket's settings"))
        trail.miss(f"{name} of the bucket's settings", "not set")
    variables = (
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_CLIENT_SECRET",
        "AZURE_FEDERATED_TOKEN_FILE",
        "IDENTITY_ENDPOINT",
    )
    for variable in variables:
        if environ.get(variable):
            return Credentials("library", trail.told(f"{variable} of the environment"))
        trail.miss(variable, "not set")
    return Credentials(*_metadata(settings, surroundings, trail, "az"))


def _metadata(
    settings: BucketSettings, surroundings: Surroundings, trail: _Trail, provider: Literal["s3", "gs", "az"]
) -> tuple[Kind, str]:
    source = "the machine's metadata service"
    is_there = _VENDORS[provider] in surroundings.vendor
    if provider == "s3" and surroundings.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        is_there = False
    if provider == "gs" and surroundings.environ.get("GCE_METADATA_HOST"):
        is_there = True
    if settings.use_metadata or (settings.use_metadata is None and is_there):
        return "library", trail.told(source)
    why = "use_metadata = false" if settings.use_metadata is False else "not a machine of this cloud"
    trail.miss(source, why)
    return "none", trail.told(None)


@dataclass(frozen=True, slots=True)
class _Profile:
    key: AccessKey | None
    why: str
    region: str


def _read_profile(settings: BucketSettings, surroundings: Surroundings, profile: str) -> _Profile:
    """A profile of the files that AWS's tools write."""
    folder = surroundings.home / ".aws"
    environ = surroundings.environ
    credentials = settings.credentials_file or _named(environ, "AWS_SHARED_CREDENTIALS_FILE", folder / "credentials")
    config = _named(environ, "AWS_CONFIG_FILE", folder / "config")
    sections = (
        _section(credentials, profile),
        _section(config, profile if profile == "default" else f"profile {profile}"),
    )
    region = next((values["region"] for values in sections if values.get("region")), "")
    for values in sections:
        if values.get("aws_access_key_id") and values.get("aws_secret_access_key"):
            token = Secret(values.get("aws_session_token", ""))
            secret = Secret(values["aws_secret_access_key"])
            return _Profile(AccessKey(values["aws_access_key_id"], secret, token), "", region)
    for name in ("role_arn", "sso_session", "sso_start_url", "credential_process"):
        if any(name in values for values in sections):
            return _Profile(None, f"needs {name}, which is not read here: export its keys", region)
    is_there = credentials.is_file() or config.is_file()
    return _Profile(None, "no such profile" if is_there else "no such file", region)


def _named(environ: Mapping[str, str], variable: str, default: Path) -> Path:
    return Path(environ[variable]) if environ.get(variable) else default


def _section(file: Path, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="\0")
    try:
        parser.read_string(file.read_text())
    except (OSError, UnicodeDecodeError, configparser.Error):
        return {}
    return dict(parser.items(name)) if parser.has_section(name) else {}
