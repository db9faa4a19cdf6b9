"""Redaction. The only place that decides what of a value may be shown: secrets are masked, sizes bounded."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import Any, assert_never

from pydantic import BaseModel, JsonValue
from pydantic_core import to_json

from openagents_worker.errors import text_of
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER, dumps, replaced

__all__ = [
    "DEFAULT_REDACT_KEYS",
    "MASK",
    "redact",
    "safe_message",
    "safe_text",
    "safe_url",
    "shown_json",
    "without_named_secrets",
]

MASK = "***"

DEFAULT_REDACT_KEYS: tuple[str, ...] = (
    "api_key",
    "apikey",
    "authorization",
    "cookie",
    "credential",
    "passphrase",
    "passwd",
    "password",
    "private_key",
    "secret",
    "token",
)
"""Parts of key names whose values are secrets, whatever their case, `-` or `_`."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_HARMLESS_KEY = re.compile(r"_env$|tokeniz|token_type$")  # names a variable, a tokenizer, `bearer`: no secret
_KEY = re.compile(r"\b(sk|pk|rk|ghp|gho|xox[abp])([-_])[A-Za-z0-9_-]{8,}")
_KEY_MARK = re.compile(r"[srp]k[-_]|gh[po][-_]|xox")
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_SHORTEST_BEARER = len("Basic 12345678")
_URL_PASSWORD = re.compile(r"(?<=://)([^\s:/@]{0,256}):[^\s/]{1,1024}@")
_URL_LOGIN = re.compile(r"(?<=://)([^\s:/?#@]*):[^\s/?#]*@")  # whatever its length: a token may be a password
_LONGEST_KEY = 256
_SHORT = 64
_LONGEST_INTEGER_BITS = 1024  # of one that is shown: its digits fill a line
_LONGEST_SECRET = 2_048  # a text is masked this far beyond its cut, so that no half of a secret is left


def redact(
    value: Any,
    keys: Collection[str] = DEFAULT_REDACT_KEYS,
    *,
    max_chars: int | None = 10_000,
    max_items: int | None = 200,
    max_depth: int = 12,
) -> Any:
    """A copy of any value as plain JSON, fit to be shown; a mapping stays one, a list too.

    Values under a secret's name are masked; so are keys, bearer tokens and URL passwords inside of texts.
    Texts longer than `max_chars`, containers longer than `max_items` and nesting deeper than `max_depth` are
    cut, and say so. None means no bound; a key's name is always cut. What is not JSON becomes its text.

    >>> redact({"apiKey": "sk-123", "input_tokens": 7, "note": "at redis://:pw@host/0"})
    {'apiKey': '***', 'input_tokens': 7, 'note': 'at redis://:***@host/0'}
    """
    parts = _DEFAULT_PARTS if keys is DEFAULT_REDACT_KEYS else _parts_of(tuple(keys))
    return _Redaction(parts, max_chars, max_items).shown(value, max_depth)


def shown_json(payload: Mapping[str, Any], keys: Collection[str] = DEFAULT_REDACT_KEYS) -> str:
    """A payload as it may be shown, as compact JSON.

    >>> shown_json({"token": "abc", "step": 3})
    '{"token":"***","step":3}'
    """
    shown = redact(payload, keys)
    try:
        return to_json(shown).decode()
    except ValueError:  # half of a surrogate pair, which nobody could read again
        return dumps(replaced(shown))


def safe_text(text: str) -> str:
    """The text with everything that looks like a key, a bearer token or a URL's password masked."""
    # Most texts are ids and words: to look for what a secret cannot do without is cheaper than to match.
    if _KEY_MARK.search(text):
        text = _KEY.sub(rf"\1\2{MASK}", text)
    if len(text) >= _SHORTEST_BEARER:
        text = _BEARER.sub(rf"\1 {MASK}", text)
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
    return text


def safe_url(url: str) -> str:
    """The URL without its password, also where it stands in the query; several, as for Sentinel, too.

    >>> safe_url("rediss://me:pa@ss@host:6379/0?password=x")
    'rediss://me:***@host:6379/0?password=***'
    """
    words = "|".join(DEFAULT_REDACT_KEYS)
    text = safe_text(_URL_LOGIN.sub(rf"\1:{MASK}@", url))
    return re.sub(rf"([?&;][^=&;]*(?:{words})[^=&;]*=)[^&;]*", rf"\1{MASK}", text, flags=re.IGNORECASE)


_WORDS = "|".join(word.replace("_", "[_-]?") for word in DEFAULT_REDACT_KEYS)
_ANY_WORD = re.compile(_WORDS, re.IGNORECASE)
_NAME = rf"(?<![\w-])([\w-]{{0,64}}(?:{_WORDS})[\w-]{{0,64}})"
_NAMED_QUOTED = re.compile(
    rf"{_NAME}([\"']?\s{{0,4}}[=:]\s{{0,4}}[bru]?)([\"'])(.{{1,2048}}?)\3", re.IGNORECASE
)
# After a colon often stands prose ("password: required"): only what has a digit is a secret there.
_NAMED_BARE = re.compile(
    rf"{_NAME}(\s?=\s?|:\s(?=[^\s,;]{{0,64}}\d))([^\s\"'&,;)\]}}]{{1,2048}})", re.IGNORECASE
)


def without_named_secrets(text: str, *, quoted_only: bool = False) -> str:
    """Prose or source without what stands under a secret's name: `password=…`, `"api_key": "…"`.

    `quoted_only` for source, where what is not quoted is a name or an expression.

    >>> without_named_secrets("login failed: user=ann password=hunter2, tokens=7")
    'login failed: user=ann password=***, tokens=7'
    """

    if _ANY_WORD.search(text) is None:
        return text

    def masked(match: re.Match[str]) -> str:
        name, between, *_, value = match.groups()
        _, holds = _key(name, _DEFAULT_PARTS)
        # In prose a token is a word more often than a secret: "token: missing".
        is_word = holds is _Holds.A_SECRET_OR_NUMBER and not any(char.isdigit() for char in value)
        if holds in (_Holds.ANYTHING, _Holds.A_SECRET_OR_COUNTS) or is_word or value == MASK:
            return match[0]
        quote = match[3] if len(match.groups()) == 4 else ""
        return f"{name}{between}{quote}{MASK}{quote}"

    text = _NAMED_QUOTED.sub(masked, text)
    return text if quoted_only else _NAMED_BARE.sub(masked, text)


def safe_message(text: str, max_chars: int | None = None) -> str:
    """The text of somebody else's exception as it may be stored and shown, cut after so many characters."""
    if max_chars is None:
        return without_named_secrets(safe_text(text))
    return without_named_secrets(safe_text(text[: max_chars + _LONGEST_SECRET]))[:max_chars]


class _Redaction:
    """What is masked and where it is cut. No closures: their cycles would be the garbage collector's work."""

    __slots__ = ("_max_chars", "_max_items", "_parts", "_short")

    def __init__(self, parts: tuple[str, ...], max_chars: int | None, max_items: int | None) -> None:
        self._parts = parts
        self._max_chars = max_chars
        self._max_items = max_items
        self._short = _SHORT if max_chars is None or max_chars >= _SHORT else max_chars

    def shown(self, value: Any, depth: int) -> JsonValue:
        if isinstance(value, str):
            return _bounded(value, self._max_chars)
        if value is None or isinstance(value, (bool, int)):
            return value if value is None or SMALLEST_INTEGER <= value <= LARGEST_INTEGER else _digits(value)
        if isinstance(value, dict):  # before Mapping, whose check is slow
            return self._pairs(value, depth) if depth else f"<{len(value)} more inside>"
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, (bytes, bytearray)):
            return f"<{len(value)} bytes>"
        if isinstance(value, BaseModel):
            try:
                value = value.model_dump()
            except Exception:  # noqa: BLE001 - a model's own serializer may raise anything
                return text_of(value)
        if isinstance(value, Mapping):
            return self._pairs(value, depth) if depth else f"<{len(value)} more inside>"
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._items(value, depth) if depth else f"<{len(value)} more inside>"
        return _bounded(text_of(value), self._max_chars)

    def _pairs(self, mapping: Mapping[Any, Any], depth: int) -> JsonValue:
        out: dict[str, JsonValue] = {}
        for key, item in mapping.items():
            if self._max_items is not None and len(out) >= self._max_items:
                out["…"] = f"<{len(mapping) - self._max_items} more>"
                break
            name, holds = _key(key if isinstance(key, str) else text_of(key), self._parts)
            if holds is not _Holds.ANYTHING and _is_secret(holds, item):
                out[name] = MASK
            elif type(item) is str and len(item) <= self._short:  # most are: four calls fewer each
                out[name] = _safe_short(item)
            else:
                out[name] = self.shown(item, depth - 1)
        return out

    def _items(self, sequence: Collection[Any], depth: int) -> JsonValue:
        out: list[JsonValue] = []
        for item in sequence:
            if self._max_items is not None and len(out) >= self._max_items:
                out.append(f"<{len(sequence) - self._max_items} more>")
                break
            out.append(self.shown(item, depth - 1))
        return out


def _digits(number: int) -> str:
    return str(number) if number.bit_length() <= _LONGEST_INTEGER_BITS else "<a very large integer>"


def _normal(key: str) -> str:
    return _CAMEL.sub("_", key).replace("-", "_").replace(" ", "_").lower()


class _Holds(Enum):
    """What stands under a key, by its name."""

    ANYTHING = auto()
    A_SECRET = auto()
    A_SECRET_OR_NUMBER = auto()
    """Under `…token…`: a number is a count or an expiry."""
    A_SECRET_OR_COUNTS = auto()
    """Under `…tokens…`: a number or an object of numbers."""


def _is_secret(holds: _Holds, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    match holds:
        case _Holds.ANYTHING:
            return False
        case _Holds.A_SECRET:
            return True
        case _Holds.A_SECRET_OR_NUMBER:
            return not isinstance(value, int | float)
        case _Holds.A_SECRET_OR_COUNTS:
            return not isinstance(value, int | float | Mapping)
        case _:
            assert_never(holds)


@lru_cache(maxsize=4096)  # payloads have the same few names again and again
def _key(key: str, parts: tuple[str, ...]) -> tuple[str, _Holds]:
    """A key as it may be shown, and what it holds."""
    name = _normal(key)
    hits = () if _HARMLESS_KEY.search(name) else tuple(part for part in parts if part in name)
    holds = _Holds.A_SECRET if hits else _Holds.ANYTHING
    if hits == ("token",):
        holds = _Holds.A_SECRET_OR_COUNTS if "tokens" in name else _Holds.A_SECRET_OR_NUMBER
    return _bounded(key, _LONGEST_KEY), holds


@lru_cache  # an agents file's keys are the same in every event
def _parts_of(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_normal(key) for key in keys)


_DEFAULT_PARTS = _parts_of(DEFAULT_REDACT_KEYS)


def _bounded(text: str, max_chars: int | None) -> str:
    if max_chars is None or len(text) <= max_chars:
        return _safe_short(text) if len(text) <= _SHORT else safe_text(text)
    head = safe_text(text[: max_chars + _LONGEST_SECRET])[:max_chars]
    return f"{head}… <{len(text) - max_chars} more characters>"


@lru_cache(maxsize=8192)  # ids and names: the same ones in every event of a run
def _safe_short(text: str) -> str:
    return safe_text(text)
