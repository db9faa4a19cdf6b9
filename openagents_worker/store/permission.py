"""Permissions: the only place that finds out from an answer of Redis which right its user lacks."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from redis import exceptions

from openagents_worker.errors import RedisNoPermission, RedisRefused
from openagents_worker.redaction import safe_text
from openagents_worker.redis_url import address_of
from openagents_worker.store.plan import Plan
from openagents_worker.store.rights import Right, acl_words

__all__ = [
    "DEFAULT_USER",
    "MISSING_RIGHTS_MARK",
    "is_aborted_transaction",
    "is_permission_error",
    "missing_rights_error",
    "add_command_to_permission_error",
    "default_user_is_unrestricted",
    "permission_error",
    "set_refused_command",
    "add_rights_to_permission_error",
    "user_of",
]

MISSING_RIGHTS_MARK = "OA_LACKING"
"""A script whose user lacks rights writes nothing and fails with an error that begins with this word."""
DEFAULT_USER = "default"
MAX_SHOWN = 8  # missing rights in a message; the ACL file of the role has all rights
_NO_PERMISSION = re.compile(
    rf"NOPERM|ACL failure in script|The user executing the script can't|[Tt]his user has no permissions"
    rf"|No permissions to access|has no permissions to run|{MISSING_RIGHTS_MARK}"
)
_COMMAND = re.compile(r"permissions to run the '([^']+)'")
_USER = re.compile(r"User (\S+) has no permissions")
_IN_PIPELINE = re.compile(r"Command # \d+ \(([^)]*)\) of pipeline")
_HAS_SUBCOMMAND = frozenset({"CLIENT", "CONFIG", "SCRIPT", "MEMORY", "COMMAND", "PUBSUB", "ACL"})
_NO_KEY = frozenset(
    {"EVAL", "EVALSHA", "SCRIPT", "CLIENT", "CONFIG", "COMMAND", "INFO", "SCAN", "AUTH", "HELLO"}
)


def is_permission_error(error: BaseException) -> bool:
    """Whether Redis refused a command because its user lacks a right. This may be an error of a script."""
    if isinstance(error, exceptions.NoPermissionError):
        return True
    return isinstance(error, exceptions.ResponseError) and _NO_PERMISSION.search(str(error)) is not None


def is_aborted_transaction(error: BaseException) -> bool:
    """Whether this is the answer to EXEC after Redis refused a command of the transaction."""
    return isinstance(error, exceptions.ExecAbortError)


@contextmanager
def add_command_to_permission_error(*command: Any) -> Generator[None]:
    """Add this command to a permission error that is raised in the block: Redis does not always name it."""
    try:
        yield
    except exceptions.ResponseError as error:
        set_refused_command(error, command)
        raise


def set_refused_command(error: Exception, command: Sequence[Any]) -> None:
    """As `add_command_to_permission_error`, for an exception that was caught already."""
    if is_permission_error(error):
        _set_details(error, command=[str(word) for word in command[:3]])


def add_rights_to_permission_error(error: Exception, rights: Sequence[Right], prefix: str) -> None:
    """Add the missing rights to the error of a script, which contains their positions in `rights`, from 1."""
    _, found, positions = str(error).partition(MISSING_RIGHTS_MARK)
    if found:
        numbers = [int(word) - 1 for word in re.findall(r"\d+", positions.partition("script:")[0])]
        _set_details(error, lacking=[rights[at] for at in numbers], prefix=prefix)


def _set_details(error: Exception, **details: Any) -> None:
    error.openagents = {**getattr(error, "openagents", {}), **details}  # type: ignore[attr-defined]


def permission_error(error: Exception, where: str, url: str) -> RedisNoPermission:
    """The permission error of Redis as an error of the library. `where` is the URL without its secrets."""
    details: dict[str, Any] = getattr(error, "openagents", {})
    user = _user(error, url)
    if "lacking" in details:
        words = (acl_words(right, details["prefix"]) for right in details["lacking"])
        return missing_rights_error(words, where, user)
    command, key = _command_and_key(error, details.get("command", ()))
    refused = " ".join(word for word in (command, key) if word) or "a command"
    return RedisNoPermission(
        f"the user {user!r} of Redis at {where} is not allowed to run {refused}: {safe_text(str(error))}",
        hint=_hint([_acl_words_of_command(command, key)] if command else []),
        user=user,
        command=command or None,
        key=key or None,
        lacking=[_acl_words_of_command(command, key)] if command else [],
    )


def missing_rights_error(words: Iterable[str], where: str, user: str) -> RedisNoPermission:
    """The error for rights that a user lacks, each in the words of an ACL: `+hset ~oa:run:*`."""
    needed = _without_duplicates(words)
    command, _, pattern = needed[0].partition(" ")
    shown = ", ".join(needed[:MAX_SHOWN]) + (
        f" and {len(needed) - MAX_SHOWN} more" if len(needed) > MAX_SHOWN else ""
    )
    return RedisNoPermission(
        f"the user {user!r} of Redis at {where} lacks permissions: {shown}",
        hint=_hint(needed[:MAX_SHOWN]),
        user=user,
        command=command.removeprefix("+"),
        key=pattern.lstrip("%R~&") or None,
        lacking=needed,
    )


def _without_duplicates(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _user(error: Exception, url: str) -> str:
    found = _USER.search(str(error))
    return found[1] if found else user_of(url)


def user_of(url: str) -> str:
    """The user with which a Redis URL logs in."""
    try:
        return str(getattr(address_of(url), "username", None) or DEFAULT_USER)
    except ValueError:
        return DEFAULT_USER


def _command_and_key(error: Exception, known_words: Sequence[str]) -> tuple[str, str]:
    """The command in the words of an ACL, and its first key or channel; '' if unknown."""
    text = str(error)
    words = list(known_words)
    if found := _IN_PIPELINE.search(text):
        words = found[1].split(" ")[:3]
    found_command = _COMMAND.search(text)
    if not words:
        return (found_command[1] if found_command else ""), ""
    first = words[0].upper()
    command = (
        "|".join(words[:2]) if first in _HAS_SUBCOMMAND and len(words) > 1 else words[0].replace(" ", "|")
    )
    key = words[1] if len(words) > 1 and first not in _NO_KEY else ""
    return (found_command[1] if found_command else command).lower(), key


def _acl_words_of_command(command: str, key: str) -> str:
    sign = "&" if command in ("publish", "subscribe", "psubscribe") else "~"
    return f"+{command} {sign}{key}" if key else f"+{command}"


def default_user_is_unrestricted() -> Plan[bool]:
    """A plan that returns whether the user `default` may do everything, as in a Redis without other users.

    False also if it may not ask, or if this Redis is older than version 6.
    """
    try:
        user: dict[str, Any] = (yield lambda redis: redis.acl_getuser(DEFAULT_USER)) or {}
    except (RedisRefused, exceptions.ResponseError):
        return False
    rights = [user.get(name) for name in ("categories", "commands", "keys", "channels", "selectors")]
    return rights == [["+@all"], [], ["~*"], ["&*"], []]


def _hint(needed: Sequence[str]) -> str:
    words = " ".join(_without_duplicates(" ".join(needed).split()))
    command = f"run ACL SETUSER … {words}; " if needed else ""
    return f"{command}config/acl/ has the rights of each role, docs/security.md explains them"
