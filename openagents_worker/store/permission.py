"""Permissions. The only place that reads from an answer of Redis which right its user lacks."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from redis import exceptions

from openagents_worker.addresses import address_of
from openagents_worker.errors import RedisNoPermission
from openagents_worker.redaction import safe_text
from openagents_worker.store.rights import Right, words_of

__all__ = [
    "DEFAULT_USER",
    "LACKING",
    "is_aborted_transaction",
    "is_no_permission",
    "lacking_words",
    "naming",
    "no_permission",
    "note_command",
    "note_rights",
    "user_of",
]

LACKING = "OA_LACKING"
"""With this word a script answers that its user lacks rights, before it has written anything."""
DEFAULT_USER = "default"
SHOWN = 8  # of many missing rights: the file of the role has all of them
_SAID = re.compile(
    rf"NOPERM|ACL failure in script|The user executing the script can't|[Tt]his user has no permissions"
    rf"|No permissions to access|has no permissions to run|{LACKING}"
)
_COMMAND = re.compile(r"permissions to run the '([^']+)'")
_USER = re.compile(r"User (\S+) has no permissions")
_IN_PIPELINE = re.compile(r"Command # \d+ \(([^)]*)\) of pipeline")
_WORDS_OF_TWO = frozenset({"CLIENT", "CONFIG", "SCRIPT", "MEMORY", "COMMAND", "PUBSUB", "ACL"})
_NO_KEY = frozenset(
    {"EVAL", "EVALSHA", "SCRIPT", "CLIENT", "CONFIG", "COMMAND", "INFO", "SCAN", "AUTH", "HELLO"}
)


def is_no_permission(error: BaseException) -> bool:
    """Whether Redis says that the user may not do this; a script's error says so inside of a longer text."""
    if isinstance(error, exceptions.NoPermissionError):
        return True
    return isinstance(error, exceptions.ResponseError) and _SAID.search(str(error)) is not None


def is_aborted_transaction(error: BaseException) -> bool:
    """Whether this is Redis's answer to EXEC after it has refused a command of the transaction."""
    return isinstance(error, exceptions.ExecAbortError)


@contextmanager
def naming(*command: Any) -> Generator[None]:
    """Notes on a refusal which command it was for: Redis itself does not always say."""
    try:
        yield
    except exceptions.ResponseError as error:
        note_command(error, command)
        raise


def note_command(error: Exception, command: Sequence[Any]) -> None:
    """As `naming`, on an error that is at hand."""
    if is_no_permission(error):
        _note(error, command=[str(word) for word in command[:3]])


def note_rights(error: Exception, rights: Sequence[Right], prefix: str) -> None:
    """Notes on a refusal of a script, which says positions, what these rights are."""
    _, found, positions = str(error).partition(LACKING)
    if found:
        numbers = [int(word) - 1 for word in re.findall(r"\d+", positions.partition("script:")[0])]
        _note(error, lacking=[rights[at] for at in numbers], prefix=prefix)


def _note(error: Exception, **what: Any) -> None:
    error.openagents = {**getattr(error, "openagents", {}), **what}  # type: ignore[attr-defined]


def no_permission(error: Exception, where: str, url: str) -> RedisNoPermission:
    """The refusal as an error of ours; `where` is the URL without its secrets."""
    noted: dict[str, Any] = getattr(error, "openagents", {})
    user = _user(error, url)
    if "lacking" in noted:
        words = (words_of(right, noted["prefix"]) for right in noted["lacking"])
        return lacking_words(words, where, user)
    command, key = _command(error, noted.get("command", ()))
    what = " ".join(word for word in (command, key) if word) or "a command"
    return RedisNoPermission(
        f"the user {user!r} of Redis at {where} may not run {what}: {safe_text(str(error))}",
        hint=_hint([_acl_words(command, key)] if command else []),
        user=user,
        command=command or None,
        key=key or None,
        lacking=[_acl_words(command, key)] if command else [],
    )


def lacking_words(words: Iterable[str], where: str, user: str) -> RedisNoPermission:
    """The error that names rights which a user lacks, each as an ACL says it: `+hset ~oa:run:*`."""
    needed = _merged(words)
    command, _, pattern = needed[0].partition(" ")
    shown = ", ".join(needed[:SHOWN]) + (f" and {len(needed) - SHOWN} more" if len(needed) > SHOWN else "")
    return RedisNoPermission(
        f"the user {user!r} of Redis at {where} lacks permissions: {shown}",
        hint=_hint(needed[:SHOWN]),
        user=user,
        command=command.removeprefix("+"),
        key=pattern.lstrip("%R~&") or None,
        lacking=needed,
    )


def _merged(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _user(error: Exception, url: str) -> str:
    found = _USER.search(str(error))
    return found[1] if found else user_of(url)


def user_of(url: str) -> str:
    """The user that a URL of Redis logs in as."""
    try:
        return str(getattr(address_of(url), "username", None) or DEFAULT_USER)
    except ValueError:
        return DEFAULT_USER


def _command(error: Exception, noted: Sequence[str]) -> tuple[str, str]:
    """The command as an ACL names it, and its first key or channel; '' where it is not known."""
    text = str(error)
    words = list(noted)
    if found := _IN_PIPELINE.search(text):
        words = found[1].split(" ")[:3]
    said = _COMMAND.search(text)
    if not words:
        return (said[1] if said else ""), ""
    first = words[0].upper()
    command = "|".join(words[:2]) if first in _WORDS_OF_TWO and len(words) > 1 else words[0].replace(" ", "|")
    key = words[1] if len(words) > 1 and first not in _NO_KEY else ""
    return (said[1] if said else command).lower(), key


def _acl_words(command: str, key: str) -> str:
    sign = "&" if command in ("publish", "subscribe", "psubscribe") else "~"
    return f"+{command} {sign}{key}" if key else f"+{command}"


def _hint(needed: Sequence[str]) -> str:
    rule = f"allow it: ACL SETUSER … {' '.join(_merged(' '.join(needed).split()))}; " if needed else ""
    return f"{rule}config/acl/ has the rights of each role, docs/security.md explains them"
