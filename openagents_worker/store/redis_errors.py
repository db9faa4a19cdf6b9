"""Errors of Redis: the only place that decides what an error of Redis or of redis-py means for a command.

The command was not sent, or Redis refused it temporarily without writing anything, or its outcome is unknown
because the answer was lost. In these three cases the caller may repeat it, because every script is
idempotent. In all other cases, repeating does not help.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from types import TracebackType
from typing import Any, assert_never

from redis import exceptions

from openagents_worker.errors import RedisRefused, RedisUnreachable, RedisWrongType
from openagents_worker.redaction import safe_url
from openagents_worker.store.permission import is_permission_error, permission_error, set_refused_command
from openagents_worker.store.tls import TlsProblem, server_hung_up, tls_problem_of

__all__ = [
    "CONNECTION_LOST",
    "AnswerLost",
    "Failure",
    "TlsMismatchSuspected",
    "NotSent",
    "TlsFailed",
    "connection_broke",
    "failure_of",
    "is_wrong_type",
    "translate_connect_errors",
    "default_if_wrong_type",
    "add_command_to_error",
    "is_temporary_error",
    "translate_errors",
    "key_in_error",
    "wrong_type_error",
]

KEY_ATTRIBUTE = "_openagents_key"
"""An attribute that we add to errors of redis-py: the key of the command."""


class AnswerLost(RedisUnreachable):
    """The command was sent, but no answer came: it may have been executed. Every script may be repeated."""


class TlsFailed(RedisUnreachable):
    """The TLS handshake failed. It will fail again until a certificate or the URL is changed."""

    retryable = False


class TlsMismatchSuspected(RedisUnreachable):
    """The server accepted the connection, then closed it or stayed silent: maybe only one side uses TLS."""


class Failure(StrEnum):
    """What an error means for its command."""

    NOT_SENT = "not_sent"
    LOGIN = "login"  # not executed: Redis needs other credentials
    LATER = "later"  # nothing was written: Redis refuses the command temporarily
    LOST = "lost"  # it may have been executed
    FINAL = "final"  # repeating does not help


class NotSent(exceptions.ConnectionError):
    """There was no connection for the command, so it was not sent.

    The reason is in fields instead of `__cause__`, because a copy of an exception has no `__cause__`.
    """

    tls_problem: TlsProblem | None = None
    server_hung_up = False
    timed_out = False


CONNECTION_LOST = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.InvalidResponse,
    OSError,
    asyncio.IncompleteReadError,
)
_ERRORS = (*CONNECTION_LOST, exceptions.ResponseError)

_LATER = (
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,  # includes MASTERDOWN
    exceptions.ExecAbortError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
_OF_CLUSTER = (
    exceptions.AskError,  # includes MOVED
    exceptions.ClusterCrossSlotError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
)
CLUSTER_HINT = (
    "this Redis is a node of a Redis Cluster: use a Redis without cluster mode, or one slot of a cluster "
    "(docs/scaling.md, Several cells)"
)
# The same for answers without a class in redis-py. Redis 6 wraps the error of a script into another text, and
# redis-py does so with an error in a pipeline.
_LATER_CODE = re.compile(
    r"(?:^|: -?)(?:BUSY|CLUSTERDOWN|EXECABORT|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN"
    r"|UNBLOCKED)\b"
)


def failure_of(error: Exception) -> Failure:
    """Classify an exception of redis-py."""
    if isinstance(error, NotSent):
        return Failure.NOT_SENT
    if isinstance(error, exceptions.AuthenticationError):
        return Failure.LOGIN
    if isinstance(error, _LATER):
        return Failure.LATER
    if isinstance(error, CONNECTION_LOST):
        return Failure.LOST
    if is_permission_error(error):
        return Failure.FINAL
    is_later = isinstance(error, exceptions.ResponseError) and _LATER_CODE.search(str(error)) is not None
    return Failure.LATER if is_later else Failure.FINAL


def is_temporary_error(error: Exception) -> bool:
    """Whether Redis refuses the command temporarily, or because it is no longer the master."""
    return failure_of(error) is Failure.LATER


def connection_broke(error: BaseException | None) -> bool:
    """Whether this error of redis-py says that the connection ended during a command.

    A time-out does not count: a retry would take long.
    """
    if not isinstance(error, CONNECTION_LOST) or isinstance(error, exceptions.TimeoutError | TimeoutError):
        return False
    return failure_of(error) is Failure.LOST


# A script names the key in its error. redis-py adds `Command # 3 (HGETALL oa:fleet) of pipeline …`.
_KEY_IN_SCRIPT = re.compile(r"OA_WRONG_TYPE (\S+)")
_KEY_IN_PIPELINE = re.compile(r"Command # \d+ \(\S+ (\S+?)[\s)]")


def is_wrong_type(error: object) -> bool:
    """Whether the answer of Redis says that a key has another type than the command needs."""
    return isinstance(error, exceptions.ResponseError) and (
        "WRONGTYPE" in str(error) or "OA_WRONG_TYPE" in str(error)
    )


def key_in_error(error: Exception) -> str:
    """The key of an error about a wrong type; '' if it is unknown."""
    for pattern in (_KEY_IN_SCRIPT, _KEY_IN_PIPELINE):
        if found := pattern.search(str(error)):
            return found[1]
    return str(getattr(error, KEY_ATTRIBUTE, ""))


def wrong_type_error(key: str, where: str = "") -> RedisWrongType:
    """The error for a key that has another type than it must have. `where` is appended to the key."""
    return RedisWrongType(
        f"the key {key or '(unknown)'}{where} does not have the type that this library expects",
        hint="another program may have written it: use different prefixes (OPENAGENTS_KEY_PREFIX), or delete "
        "the key; `openagents-worker status` lists such keys",
        key=key,
    )


def default_if_wrong_type(answer: Any, default: Any) -> Any:
    """An answer of a pipeline that was executed with `raise_on_error=False`.

    Returns the default if the key has a wrong type. Raises any other exception in the answer.
    """
    if isinstance(answer, Exception):
        if not is_wrong_type(answer):
            raise answer
        return default
    return answer


def _add_key_to_error(error: Exception, command: Sequence[Any]) -> None:
    """Add the key of the command to an error about a wrong type."""
    if is_wrong_type(error) and len(command) > 1:
        setattr(error, KEY_ATTRIBUTE, command[1])


class add_command_to_error:
    """Add the command of this block to its error: the refused command, or the key with a wrong type.

    A class and not a generator, because it is entered for every command.
    """

    __slots__ = ("_command",)

    def __init__(self, command: Sequence[Any]) -> None:
        self._command = command

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if isinstance(error, exceptions.ResponseError):
            set_refused_command(error, self._command)
            _add_key_to_error(error, self._command)


@contextmanager
def translate_connect_errors() -> Iterator[None]:
    """Turn the connection errors of this block into `NotSent`: no command was sent yet."""
    try:
        yield
    except (exceptions.AuthenticationError, NotSent):
        raise
    except CONNECTION_LOST as error:
        not_sent = NotSent(str(error))
        not_sent.tls_problem = tls_problem_of(error)
        not_sent.server_hung_up = server_hung_up(error)
        not_sent.timed_out = isinstance(error, exceptions.TimeoutError | TimeoutError)
        raise not_sent from error


class translate_errors:
    """Turn the errors of redis-py in this block into errors of the library. Other exceptions are not changed.

    `url` is that of the Redis; the error contains it without its password. `kinds` are the errors to turn: by
    default those of a command, also of its connection. A class and not a generator, because it is entered for
    every command.
    """

    __slots__ = ("_kinds", "_url")

    def __init__(self, url: str, kinds: tuple[type[Exception], ...] = _ERRORS) -> None:
        self._url = url
        self._kinds = kinds

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if isinstance(error, self._kinds):
            raise _translate(error, safe_url(self._url), self._url) from error


def _translate(error: Exception, where: str, url: str) -> RedisUnreachable:
    if is_permission_error(error):
        return permission_error(error, where, url)
    failure = failure_of(error)
    match failure:
        case Failure.NOT_SENT:
            return _connect_error(error, where)
        case Failure.LOGIN:
            return RedisUnreachable(
                f"Redis at {where} refuses the login: {error}",
                hint="check the user and the password in OPENAGENTS_REDIS_URL",
            )
        case Failure.LATER:
            return RedisUnreachable(
                f"Redis at {where} temporarily refuses commands: {error}", hint=_hint_until_later(error)
            )
        case Failure.LOST:
            return AnswerLost(f"the answer of Redis at {where} to a command was lost: {error}")
        case Failure.FINAL if is_wrong_type(error):
            return wrong_type_error(key_in_error(error), f" in Redis at {where}")
        case Failure.FINAL:
            return RedisRefused(f"Redis at {where} refused a command: {error}", hint=_hint(error))
        case _:
            assert_never(failure)


def _connect_error(error: Exception, where: str) -> RedisUnreachable:
    cause = error if isinstance(error, NotSent) else NotSent(str(error))
    if cause.tls_problem is not None:
        return TlsFailed(
            f"TLS with Redis at {where} failed: {cause.tls_problem.what}", hint=cause.tls_problem.hint
        )
    if where.startswith("rediss://") and (cause.server_hung_up or cause.timed_out):
        return TlsMismatchSuspected(
            f"TLS with Redis at {where} failed: {error}",
            hint="check that Redis uses TLS at this port (without TLS, the URL must begin with redis://) and "
            "whether it requires a client certificate (ssl_certfile, ssl_keyfile)",
        )
    if cause.server_hung_up:
        return TlsMismatchSuspected(
            f"Redis at {where} closes every connection immediately: {error}",
            hint="if Redis requires TLS, the URL must begin with rediss://; or Redis may still be starting",
        )
    return RedisUnreachable(
        f"cannot reach Redis at {where}: {error}",
        hint="check that Redis is running and that OPENAGENTS_REDIS_URL is correct; `openagents-worker dev` "
        "starts a Redis",
    )


def _hint_until_later(error: Exception) -> str | None:
    """What an operator can do about it; None if Redis has to finish something."""
    if isinstance(error, exceptions.OutOfMemoryError) or re.search(r"\bOOM\b", str(error)):
        return "the memory of Redis is full: raise maxmemory, or delete sessions (`openagents-worker doctor`)"
    if "MISCONF" in str(error):
        return "Redis cannot write to its disk: look at its log, and at the space on the disk"
    if "READONLY" in str(error) or isinstance(error, exceptions.ReadOnlyError):
        return (
            "this Redis is a replica: put the address of its master, or of its sentinels, into "
            "OPENAGENTS_REDIS_URL"
        )
    return CLUSTER_HINT if _is_of_cluster(error) else None


def _is_of_cluster(error: Exception) -> bool:
    """Whether a node of a Redis Cluster refuses a key: it belongs to another node, or to none."""
    return isinstance(error, _OF_CLUSTER) and not isinstance(error, exceptions.MasterDownError)


def _hint(error: Exception) -> str:
    if isinstance(error, exceptions.NoPermissionError):
        return "the user in OPENAGENTS_REDIS_URL lacks a permission; ACL LOG shows which one"
    if _is_of_cluster(error):
        return CLUSTER_HINT
    return "repeating the command does not help; please report this error"
