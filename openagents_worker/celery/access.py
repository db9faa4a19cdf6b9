"""Access. The only place that asks at a worker's start whether its users of Redis may do all that it does."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing, suppress

from openagents_worker.addresses import RedisAddress, address_of, is_redis_url
from openagents_worker.errors import RedisNoPermission
from openagents_worker.producer.client import cell_of
from openagents_worker.redaction import safe_url
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.permission import missing_rights_error, user_of
from openagents_worker.store.rights import acl_words, sample_of
from openagents_worker.store.roles import ROLES, RoleName

__all__ = ["check_access"]

WORKER = ROLES[RoleName.WORKER]
_SAMPLE = "0"
"""In place of a star in a pattern."""

Asked = tuple[str, str, str]  # a command, a key or channel, and what an ACL has to say for it


def check_access(settings: Settings, queues: Iterable[str]) -> None:
    """Raises `RedisNoPermission` that names all that a worker's users lack, before anything is begun.

    What a worker can do without is not asked for. A broker that is not Redis has rules of its own, and so has
    one of its own that runs no scripts.
    """
    ours = [
        (right.command, sample_of(right.kind, settings.key_prefix) if right.kind else "", words)
        for right in sorted(WORKER.needed)
        for words in [acl_words(right, settings.key_prefix)]
    ]
    _check(cell_of(settings), ours)
    if not settings.broker_url or not is_redis_url(settings.broker_url):
        return
    of_broker = _of_broker(queues, settings.broker_url)
    if settings.broker_url == settings.redis_url:
        _check(cell_of(settings), of_broker)
        return
    with suppress(_NoScripts):
        _check(Cell(settings.broker_url, prefix=settings.key_prefix), of_broker)


class _NoScripts(RedisNoPermission):
    """Nobody can be asked there."""


def _of_broker(queues: Iterable[str], url: str) -> list[Asked]:
    address = address_of(url)
    db = address.db if isinstance(address, RedisAddress) else 0
    names = tuple(queues)
    return [
        (
            command,
            pattern.replace("*", _SAMPLE) if right.sign == "~" else pattern,
            _words(command, pattern, right.sign),
        )
        for right in WORKER.broker
        for pattern in (right.patterns(names, db) if right.pattern else [""])
        for command in right.commands
    ]


def _words(command: str, pattern: str, sign: str) -> str:
    return f"+{command.lower()} {sign}{pattern}" if pattern else f"+{command.lower()}"


def _check(cell: Cell, asked: list[Asked]) -> None:
    question = scripts.lacking(commands=[one[0] for one in asked], keys=[one[1] for one in asked])
    with closing(Store(cell, max_connections=1)) as store:
        try:
            lacking = store.run(question)
        except RedisNoPermission as error:
            raise _NoScripts(
                error.message,
                hint=error.hint,
                user=error.user,
                command=error.command,
                key=error.key,
                lacking=error.lacking,
            ) from error
    if lacking:
        words = [asked[position][2] for position in lacking]
        raise missing_rights_error(words, safe_url(cell.url), user_of(cell.url))
