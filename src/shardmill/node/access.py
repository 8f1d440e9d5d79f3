"""Who may do what. A node without credentials listens on loopback, where everyone is the same principal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shardmill.core.errors import AccessDenied
from shardmill.core.refs import Bucket

Action = Literal["read", "write", "run", "admin"]
"""`run` is registering code; no other right implies it."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    name: str


ANONYMOUS = Principal("anonymous")


@dataclass(frozen=True, slots=True)
class Access:
    """Rights by principal; one that is not listed has none."""

    rights: Mapping[Principal, frozenset[Action]] = field(
        default_factory=lambda: {ANONYMOUS: frozenset[Action](("read", "write", "run", "admin"))}
    )

    def check(self, principal: Principal, action: Action, bucket: Bucket | None) -> None:
        """Return if the principal may; `bucket` None: the action concerns no bucket.

        Raises:
            AccessDenied: It may not.
        """
        if action not in self.rights.get(principal, frozenset()):
            where = f" on {bucket}" if bucket else ""
            raise AccessDenied(f"{principal.name} has no right to {action}{where}")
