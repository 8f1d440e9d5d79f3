"""Who may do what."""

import typing

import pytest

from shardmill.core.errors import AccessDenied
from shardmill.core.refs import Bucket
from shardmill.node.access import ANONYMOUS, Access, Action, Principal

ACTIONS: tuple[Action, ...] = typing.get_args(Action)
READER = Principal("reader")
BUCKET = Bucket.of("ais", "photos")


@pytest.mark.parametrize("action", ACTIONS)
def test_without_credentials_everyone_is_one_principal_who_may_do_everything(action: Action) -> None:
    Access().check(ANONYMOUS, action, BUCKET)
    Access().check(ANONYMOUS, action, None)


@pytest.mark.parametrize("granted", ACTIONS)
def test_no_right_implies_another(granted: Action) -> None:
    access = Access({READER: frozenset([granted])})
    for action in ACTIONS:
        if action == granted:
            access.check(READER, action, BUCKET)
            continue
        with pytest.raises(AccessDenied, match=f"reader has no right to {action} on ais://photos"):
            access.check(READER, action, BUCKET)


def test_who_is_not_listed_may_do_nothing() -> None:
    with pytest.raises(AccessDenied) as refused:
        Access({READER: frozenset(ACTIONS)}).check(ANONYMOUS, "read", None)
    assert str(refused.value) == "anonymous has no right to read"
    assert refused.value.status == 403
