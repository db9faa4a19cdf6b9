"""Access: the only place that checks at a worker's start that its Redis users have all needed rights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing, suppress

from openagents_worker.errors import RedisNoPermission
from openagents_worker.producer.client import cell_of
from openagents_worker.redaction import safe_url
from openagents_worker.redis_url import RedisAddress, address_of, is_redis_url
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.permission import (
    DEFAULT_USER,
    default_user_is_unrestricted,
    missing_rights_error,
    user_of,
)
from openagents_worker.store.rights import acl_words, sample_of
from openagents_worker.store.roles import ROLES, RoleName

__all__ = ["check_access"]

WORKER = ROLES[RoleName.WORKER]
_SAMPLE = "0"
"""Replaces a star in a pattern."""

NeededRight = tuple[str, str, str]  # a command, a sample key or channel, and the ACL rule that allows it


def check_access(settings: Settings, queues: Iterable[str]) -> None:
    """Raises `RedisNoPermission` that lists all missing rights of a worker's Redis users.

    Optional rights are not checked. The user `default` without restrictions has all of them. A broker that is
    not Redis has other access rules, and a separate broker whose user may not run scripts cannot be checked.
    """
    _check(cell_of(settings), lambda: _rights_at_store(settings.key_prefix))
    broker_url = settings.broker_url
    if not broker_url or not is_redis_url(broker_url):
        return
    if broker_url == settings.redis_url:
        _check(cell_of(settings), lambda: _rights_at_broker(queues, broker_url))
        return
    with suppress(_NoScriptRight):
        cell = Cell(broker_url, prefix=settings.key_prefix)
        _check(cell, lambda: _rights_at_broker(queues, broker_url))


class _NoScriptRight(RedisNoPermission):
    """The user may not run scripts, so its rights cannot be checked."""


def _rights_at_store(prefix: str) -> list[NeededRight]:
    """The rights that a worker needs for our keys: what its scripts do is found in their sources."""
    return [
        (right.command, sample_of(right.kind, prefix) if right.kind else "", acl_words(right, prefix))
        for right in sorted(WORKER.needed)
    ]


def _rights_at_broker(queues: Iterable[str], url: str) -> list[NeededRight]:
    """The rights that a worker needs at a Redis broker for these queues."""
    address = address_of(url)
    db = address.db if isinstance(address, RedisAddress) else 0
    names = tuple(queues)
    return [
        (
            command,
            pattern.replace("*", _SAMPLE) if right.sign == "~" else pattern,
            _acl_rule(command, pattern, right.sign),
        )
        for right in WORKER.broker
        for pattern in (right.patterns(names, db) if right.pattern else [""])
        for command in right.commands
    ]


def _acl_rule(command: str, pattern: str, sign: str) -> str:
    return f"+{command.lower()} {sign}{pattern}" if pattern else f"+{command.lower()}"


def _check(cell: Cell, find_needed: Callable[[], list[NeededRight]]) -> None:
    """Raises `RedisNoPermission` for the missing rights of the user of this cell."""
    with closing(Store(cell, max_connections=1)) as store:
        # To find the rights that a worker needs takes longer than the rest of its start.
        if user_of(cell.url) == DEFAULT_USER and store.execute(default_user_is_unrestricted()):
            return
        needed = find_needed()
        script_call = scripts.lacking(commands=[one[0] for one in needed], keys=[one[1] for one in needed])
        try:
            lacking = store.run(script_call)
        except RedisNoPermission as error:
            raise _NoScriptRight(
                error.message,
                hint=error.hint,
                user=error.user,
                command=error.command,
                key=error.key,
                lacking=error.lacking,
            ) from error
    if lacking:
        rules = [needed[position][2] for position in lacking]
        raise missing_rights_error(rules, safe_url(cell.url), user_of(cell.url))
