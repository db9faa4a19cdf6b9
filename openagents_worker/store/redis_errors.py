"""Failures. The only place that says what an error of Redis, or of its client, means for a command.

The command was never sent, or Redis takes it later and has written nothing, or nobody knows, because the
answer was lost: in these cases it may be repeated, as every script may be. Or repeating it will not help.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, assert_never

from redis import exceptions

from openagents_worker.errors import RedisRefused, RedisUnreachable, RedisWrongType
from openagents_worker.redaction import safe_url
from openagents_worker.store.permission import is_no_permission, no_permission
from openagents_worker.store.tls import TlsProblem, is_hung_up_on, tls_problem_of

__all__ = [
    "CONNECTION_LOST",
    "AnswerLost",
    "Failure",
    "NoGreeting",
    "NotSent",
    "TlsFailed",
    "connection_broke",
    "failure_of",
    "is_wrong_type",
    "not_sent",
    "note_key",
    "or_else",
    "refuses_now",
    "translating",
    "wrong_key_of",
    "wrong_type_error",
]

KEY = "_openagents_key"
"""Attribute of redis-py's error: the key that its command was about."""


class AnswerLost(RedisUnreachable):
    """The command was sent and no answer came: it may have been carried out. Every script may be repeated."""


class TlsFailed(RedisUnreachable):
    """No TLS can be agreed upon with what answers there, until somebody changes a certificate or the URL."""

    retryable = False


class NoGreeting(RedisUnreachable):
    """Somebody is there, and says nothing or hangs up: one side may speak TLS, and the other not."""


class Failure(StrEnum):
    """What an error means for the command that met it."""

    NOT_SENT = "not_sent"
    LOGIN = "login"  # nothing was carried out: Redis wants other credentials first
    LATER = "later"  # nothing was written: Redis is there, and takes the command in a while
    LOST = "lost"  # it may have been carried out
    FINAL = "final"  # repeating will not help


class NotSent(exceptions.ConnectionError):
    """There was no connection for the command.

    What is known of why is a field, not the cause: a copy of an exception has no cause.
    """

    tls_problem: TlsProblem | None = None
    hung_up_on = False
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
    exceptions.ClusterDownError,  # MASTERDOWN is one, too
    exceptions.ExecAbortError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
# The same where redis-py has no class for it. Redis 6 puts a script's error into a sentence of its own, and
# redis-py puts a pipeline's into another.
_LATER_CODE = re.compile(
    r"(?:^|: -?)(?:BUSY|CLUSTERDOWN|EXECABORT|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN"
    r"|UNBLOCKED)\b"
)


def failure_of(error: Exception) -> Failure:
    """What an error that came out of redis-py means."""
    if isinstance(error, NotSent):
        return Failure.NOT_SENT
    if isinstance(error, exceptions.AuthenticationError):
        return Failure.LOGIN
    if isinstance(error, _LATER):
        return Failure.LATER
    if isinstance(error, CONNECTION_LOST):
        return Failure.LOST
    if is_no_permission(error):
        return Failure.FINAL
    is_later = isinstance(error, exceptions.ResponseError) and _LATER_CODE.search(str(error)) is not None
    return Failure.LATER if is_later else Failure.FINAL


def refuses_now(error: Exception) -> bool:
    """Whether this is the answer of a Redis that takes no command for a while, or is master no more."""
    return failure_of(error) is Failure.LATER


def connection_broke(error: Exception) -> bool:
    """Whether the connection ended under a command. One that is silent is another thing: it costs time."""
    is_silent = isinstance(error, exceptions.TimeoutError | TimeoutError)
    return failure_of(error) is Failure.LOST and not is_silent


# A script names the key itself; a pipeline of redis-py says `Command # 3 (HGETALL oa:fleet) of pipeline …`.
_KEY_IN_SCRIPT = re.compile(r"OA_WRONG_TYPE (\S+)")
_KEY_IN_PIPELINE = re.compile(r"Command # \d+ \(\S+ (\S+?)[\s)]")


def is_wrong_type(error: object) -> bool:
    """Whether Redis says that a key holds something of another type than the command needs."""
    return isinstance(error, exceptions.ResponseError) and (
        "WRONGTYPE" in str(error) or "OA_WRONG_TYPE" in str(error)
    )


def wrong_key_of(error: Exception) -> str:
    """The key that such an error is about; '' where nothing names it."""
    for pattern in (_KEY_IN_SCRIPT, _KEY_IN_PIPELINE):
        if found := pattern.search(str(error)):
            return found[1]
    return str(getattr(error, KEY, ""))


def wrong_type_error(key: str, where: str = "") -> RedisWrongType:
    """The error that names a key of another type than it must have."""
    return RedisWrongType(
        f"the key {key or '(unknown)'}{where} is not what this library keeps there",
        hint="another program may have written it: choose another OPENAGENTS_KEY_PREFIX for one of them, or "
        "delete the key; `openagents-worker status` lists such keys",
        key=key,
    )


def or_else(answer: Any, default: Any) -> Any:
    """One answer of a pipeline that was asked without raising: the default where its key has a wrong type."""
    if isinstance(answer, Exception):
        if not is_wrong_type(answer):
            raise answer
        return default
    return answer


def note_key(error: Exception, command: Sequence[Any]) -> None:
    """Let an error of a wrong type know the key of the command that it answers."""
    if is_wrong_type(error) and len(command) > 1:
        setattr(error, KEY, command[1])


@contextmanager
def not_sent() -> Iterator[None]:
    """What fails in this block fails before a command is sent."""
    try:
        yield
    except (exceptions.AuthenticationError, NotSent):
        raise
    except CONNECTION_LOST as error:
        lost = NotSent(str(error))
        lost.tls_problem = tls_problem_of(error)
        lost.hung_up_on = is_hung_up_on(error)
        lost.timed_out = isinstance(error, exceptions.TimeoutError | TimeoutError)
        raise lost from error


@contextmanager
def translating(url: str) -> Iterator[None]:
    """Errors of redis-py as errors of ours; `url` says which Redis it is. What is no error of Redis stays."""
    try:
        yield
    except _ERRORS as error:
        raise _translated(error, safe_url(url), url) from error


def _translated(error: Exception, where: str, url: str) -> RedisUnreachable:
    if is_no_permission(error):
        return no_permission(error, where, url)
    failure = failure_of(error)
    match failure:
        case Failure.NOT_SENT:
            return _not_connected(error, where)
        case Failure.LOGIN:
            return RedisUnreachable(
                f"Redis at {where} refuses the login: {error}", hint="check OPENAGENTS_REDIS_URL"
            )
        case Failure.LATER:
            return RedisUnreachable(f"Redis at {where} takes no writes now: {error}")
        case Failure.LOST:
            return AnswerLost(f"Redis at {where} got a command and its answer was lost: {error}")
        case Failure.FINAL if is_wrong_type(error):
            return wrong_type_error(wrong_key_of(error), f" in Redis at {where}")
        case Failure.FINAL:
            return RedisRefused(f"Redis at {where} refuses a command: {error}", hint=_hint(error))
        case _:
            assert_never(failure)


def _not_connected(error: Exception, where: str) -> RedisUnreachable:
    lost = error if isinstance(error, NotSent) else NotSent(str(error))
    if lost.tls_problem is not None:
        return TlsFailed(f"no TLS with Redis at {where}: {lost.tls_problem.what}", hint=lost.tls_problem.hint)
    if where.startswith("rediss://") and (lost.hung_up_on or lost.timed_out):
        return NoGreeting(
            f"no TLS with Redis at {where}: {error}",
            hint="does it speak TLS at this port? without TLS a URL begins with redis://; "
            "or does it want a certificate of ours (ssl_certfile, ssl_keyfile)?",
        )
    if lost.hung_up_on:
        return NoGreeting(
            f"Redis at {where} closes each connection at once: {error}",
            hint="does it want TLS? then the URL begins with rediss://; or is it still starting?",
        )
    return RedisUnreachable(
        f"cannot reach Redis at {where}: {error}",
        hint="is it running, and is OPENAGENTS_REDIS_URL right? `openagents-worker dev` starts one",
    )


def _hint(error: Exception) -> str:
    if isinstance(error, exceptions.NoPermissionError):
        return "the user of OPENAGENTS_REDIS_URL lacks a permission; ACL LOG says which"
    return "repeating will not help; please report it"
