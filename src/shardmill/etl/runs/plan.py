"""What is to be run, and the key under which its result is kept: the same key means the same bytes."""

import hashlib
from dataclasses import dataclass, replace

from shardmill.core.refs import ObjectRef
from shardmill.core.specs import SPEC_DIGITS, Spec
from shardmill.etl.environments.environments import Environment
from shardmill.etl.versions.registry import FORMAT, Version, arguments_digest


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run: everything that decides the bytes, and who may have them."""

    version: Version
    environment: Environment
    environment_id: str
    executable: str
    """Of a command: what tells it from others of its name."""
    ref: ObjectRef
    spec: Spec
    """Resolved; without `k`, which decides nothing."""
    seed: int
    source_version: str
    is_repeatable: bool
    """The same seed gives the same bytes, as far as is known."""
    is_shared: bool
    """The same bytes come again, so one run is enough for all."""
    is_scratch: bool
    """Of use for a while only, unless a second reader comes."""

    @property
    def key(self) -> str:
        """64 hex digits over what decides the bytes; see `result_key`."""
        return result_key(self)

    @property
    def origin(self) -> str | None:
        """16 hex digits over what the bytes of one sample depend on beside seed and sample.

        None: on more than that, or there are no samples.
        """
        if not self.is_repeatable or self.version.info.kind != "sample":
            return None
        spec = Spec("x", args=self.spec.args)
        return result_key(replace(self, spec=spec))[:16]

    @property
    def shown_spec(self) -> str:
        """As in URLs, without `k`."""
        return str(replace(self.spec, digest=self.version.info.digest[:SPEC_DIGITS]))

    @property
    def facts(self) -> dict[str, str]:
        """What is told of a kept result."""
        return {
            "transform": self.version.label,
            "spec": self.shown_spec,
            "bucket": str(self.ref.bucket),
            "object": self.ref.key,
            "version": self.source_version,
            "environment": self.version.info.environment,
        }


def result_key(plan: Plan) -> str:
    """The identity of a result: full digest, options, object and its version, environment, format of our own code."""
    info = plan.version.info
    spec = replace(plan.spec, name="x", digest=None, k=None)
    parts = [
        str(FORMAT),
        info.digest,
        str(plan.version.allow_pickle),
        str(spec),
        str(plan.ref.bucket),
        plan.ref.key,
        plan.source_version,
        plan.environment_id,
        plan.executable,
    ]
    if info.args:
        # Of them the options have but 12 digits.
        parts.append(str(arguments_digest(info.args)))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
