"""Secrets in prose. The only place that masks values behind the name of a secret in a text: `password=…`.

`mask_prose` also masks texts with the form of a secret (`secret_forms`). It is used for error messages, log
lines, and reasons of users.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from openagents_worker.secret_forms import MASK, PLACEHOLDER, has_digit, mask_secrets, on_secret_remembered
from openagents_worker.secret_names import ValueKind, is_secret, value_kind

__all__ = ["mask_named", "mask_prose", "mask_short_prose", "mask_values"]

LONGEST_NAME_CHARS = 64
LONGEST_WORD_CHARS = 19  # a longer text without a space is not a word

_HINTS = ("passw", "passphrase", "secret", "token", "key", "auth", "cookie", "credential", "pwd")
_SHORT_NAMES = frozenset({"pwd", "pass"})
_EXPRESSION = re.compile(r"[A-Za-z_]+(?:\.[A-Za-z_]+)*[(\[]")  # in source code: a call or a subscript
_REST_OF_LINE = re.compile(r"cookie|authorization", re.IGNORECASE)  # headers with several values
_SEPARATOR = re.compile(r"[=:]")
_QUOTED = re.compile(r"""\s{0,4}[bru]?\\{0,3}(["'])((?:(?!\\{0,3}\1).){1,2048})""", re.DOTALL)
_ELEMENT = re.compile(r"<([A-Za-z_][\w:.-]{0,63})>([^<>]{1,2048})</")
_FLAG = re.compile(r"""--(?<![\w-]--)([a-z][\w-]{0,63})(\s{1,4}|["'],\s{0,4}["'])([^\s"']{1,2048})""")
_WITH_SCHEME = re.compile(r"(?:Bearer|Basic|Token|Digest|ApiKey)\s{1,8}[A-Za-z0-9+/=_.~-]{8}", re.IGNORECASE)
_BARE = re.compile(r"""(>?\s{0,4}(?:[|>]-?\s{1,8})?)([^\s"',&;<>]{1,64})""")
_BARE_REST = re.compile(r"""[^\s"',&;<>]{0,2048}""")  # it is read only if its beginning is a secret
_LINE = re.compile(r"\s{0,4}([^\r\n\"']{1,256})")
_REST = re.compile(r"[^\r\n\"']{0,4096}")
_HARMLESS_VALUES = frozenset(
    {"none", "null", "true", "false", "required", "missing", "invalid", "str", "string", "bytes", "any",
     "optional", "undefined", "nil", "empty", "unset", "redacted", MASK}
)  # fmt: skip


def mask_named(text: str, *, quoted_only: bool = False) -> str:
    """The text with masks instead of values behind names of secrets: `password=…`, `"api_key": "…"`.

    `quoted_only` is for source code, where an unquoted value is a name or an expression.

    >>> mask_named("login failed: user=ann password=hunter2, tokens=7")
    'login failed: user=ann password=***, tokens=7'
    """
    lowered = text.lower()
    for hint in _HINTS:  # a loop, because a generator would take most of the time for a short text
        if hint in lowered:
            break
    else:
        return text
    if "</" in text:
        text = _ELEMENT.sub(_masked_element, text)
    if "--" in text and not quoted_only:
        text = _FLAG.sub(_masked_flag, text)
    parts: list[str] = []
    done = 0
    for found in _SEPARATOR.finditer(text):
        at = found.start()
        if at < done:
            continue
        named = _named_value(text, at, done, quoted_only)
        if named is not None:
            start, end = named
            parts += (text[done:start], MASK)
            done = end
    return "".join((*parts, text[done:])) if parts else text


def _named_value(text: str, at: int, done: int, quoted_only: bool) -> tuple[int, int] | None:
    """The start and end of the secret whose name ends before the separator at `at`; None without a secret."""
    before = text[max(done, at - LONGEST_NAME_CHARS - 6) : at]
    name = _name_at_end(before)
    if name is None:
        return None
    kind = value_kind(name)
    if kind in (ValueKind.NOT_SECRET, ValueKind.SECRET_OR_COUNTS) and name.lower() not in _SHORT_NAMES:
        return None
    is_assigned = text[at] == "="
    if (value := _QUOTED.match(text, at + 1)) is not None:
        may_be_word = kind is ValueKind.SECRET_OR_NUMBER and _is_word(value[2])
        return None if may_be_word or _is_harmless(value[2], name) else value.span(2)
    if quoted_only or text[at + 1 : at + 2] in ("=", ":"):
        return None
    if not is_assigned and _REST_OF_LINE.search(name) and (value := _LINE.match(text, at + 1)) is not None:
        if not _is_header(value[1]):
            return None
        rest = _REST.match(text, value.end())
        return value.start(1), rest.end() if rest else value.end()
    value = _BARE.match(text, at + 1)
    if value is None or _is_harmless(value[2], name) or not _is_bare_secret(value, kind, is_assigned):
        return None
    start, end = value.span(2)
    if (rest := _BARE_REST.match(text, end)) is not None:
        end = rest.end()
    return start, start + len(text[start:end].rstrip(").]}"))


def _name_at_end(before: str) -> str | None:
    """The name at the end of the text, without quotes and brackets around it; None without a name."""
    at = len(before)
    while at and before[at - 1] in " \t":
        at -= 1
    if at and before[at - 1] == "]":
        at -= 1
    if at and before[at - 1] in "\"'":
        at -= 1
        while at and before[at - 1] == "\\":
            at -= 1  # JSON in a JSON string
    end = at
    while at and (before[at - 1].isalnum() or before[at - 1] in "_-."):
        at -= 1
    return before[at:end] or None


def _is_bare_secret(value: re.Match[str], kind: ValueKind, is_assigned: bool) -> bool:
    """Whether an unquoted value is a secret, not a word of prose or an expression of source code."""
    text, blanks = value[2], value[1]
    if kind is ValueKind.SECRET_OR_NUMBER and (text.isdigit() or _is_word(text)):
        return False  # a count, or a word: "token: missing"
    if text.startswith(MASK) or PLACEHOLDER.fullmatch(text) or _EXPRESSION.match(text):
        return False
    if not is_assigned or blanks:  # prose, YAML, or source code with spaces around the =
        return has_digit(text) or (text[1:] != text[1:].lower() and not text.isidentifier())
    return True


def _is_harmless(value: str, name: str) -> bool:
    word = value.strip("()[]{}.").lower()
    is_same = word == name.lower() or word.endswith((f".{name.lower()}", f"_{name.lower()}"))
    return word in _HARMLESS_VALUES or (is_same and not has_digit(word)) or not word.strip("*…")


def _is_word(value: str) -> bool:
    """Whether a value under `token` is prose: the name of a state, or a sentence."""
    is_of_one_case = value[1:] == value[1:].lower() or value == value.upper()
    return not has_digit(value) and (" " in value or (is_of_one_case and len(value) <= LONGEST_WORD_CHARS))


def _masked_element(found: re.Match[str]) -> str:
    name, value = found.groups()
    is_a_secret = value_kind(name) is ValueKind.SECRET or (
        value_kind(name) is ValueKind.SECRET_OR_NUMBER and not _is_word(value)
    )
    return f"<{name}>{MASK}</" if is_a_secret and value.strip() else found[0]


def _masked_flag(found: re.Match[str]) -> str:
    name, between, value = found.groups()
    is_a_secret = value_kind(name) in (ValueKind.SECRET, ValueKind.SECRET_OR_NUMBER)
    # "use --password to log in" is a sentence; in a list of arguments a value is quoted.
    is_a_secret = is_a_secret and not value.startswith("-") and (has_digit(value) or "," in between)
    return f"--{name}{between}{MASK}" if is_a_secret and not PLACEHOLDER.fullmatch(value) else found[0]


def _is_header(value: str) -> bool:
    """Whether the text after `Cookie:` is the value of a header. Prose has no scheme, no `=` and no digit."""
    return "=" in value or (has_digit(value) and MASK not in value) or _WITH_SCHEME.match(value) is not None


def mask_prose(text: str) -> str:
    """The text of an error, a log line or a reason, masked by both `mask_secrets` and `mask_named`.

    >>> mask_prose("cannot log in with password=hunter2 at https://me:pw@host/?token=a1b2c3")
    'cannot log in with password=*** at https://me:***@host/?token=***'
    """
    return mask_named(mask_secrets(text))


@lru_cache(maxsize=8192)  # many lines have the same ids and names
def mask_short_prose(text: str) -> str:
    """The same as `mask_prose`, with a cache for short texts that are repeated."""
    return mask_prose(text)


on_secret_remembered(mask_short_prose.cache_clear)


def mask_values(value: Any, depth: int = 8) -> Any:
    """A copy of JSON-like data. Texts are masked as prose, values under names of secrets completely.

    >>> mask_values({"password": "hunter2", "why": ["at redis://:pw@host/0"]})
    {'password': '***', 'why': ['at redis://:***@host/0']}
    """
    if isinstance(value, str):
        return mask_prose(value)
    if depth and isinstance(value, Mapping):
        return {
            name: MASK if is_secret(value_kind(str(name)), item) else mask_values(item, depth - 1)
            for name, item in value.items()
        }
    if depth and type(value) in (list, tuple):
        return type(value)(mask_values(item, depth - 1) for item in value)
    return "<nested too deeply to be shown>" if isinstance(value, Mapping | list | tuple) else value
