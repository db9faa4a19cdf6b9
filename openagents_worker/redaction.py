"""Redaction. The only place that makes values safe to show: it masks secrets and limits sizes.

Which values are masked:

- Error messages are masked when the error of this library is created, so they are masked in results,
  `RunFailed`, events, logs, tracebacks, and messages for the model. Reasons from users (`cancel`, `resume`)
  and URLs in settings are masked, too.
- Events, log lines and values in Flower are masked completely.
- Texts of users, tools and models (the input, results of tools, the answer) are not masked in the parts of
  the conversation: journal, transcript, artifacts, state, and the output of the result. If a tool returns a
  key, the model gets the key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from math import isfinite
from typing import Any

from pydantic import BaseModel, JsonValue
from pydantic_core import to_json

from openagents_worker.errors import text_of
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER, dumps, replaced
from openagents_worker.secret_forms import MASK, mask_secrets, mask_short, mask_url, on_secret_remembered
from openagents_worker.secret_names import DEFAULT_REDACT_KEYS, ValueKind, is_secret, parts_of, value_kind
from openagents_worker.secret_text import mask_named, mask_prose, mask_short_prose

__all__ = [
    "DEFAULT_REDACT_KEYS",
    "MASK",
    "MAX_VALUES",
    "TooManyValues",
    "redact",
    "safe_message",
    "safe_text",
    "safe_url",
    "shown_json",
    "shown_reason",
    "without_named_secrets",
]

_LONGEST_KEY = 256
_MOST_VALUES = 100_000  # in one value; a list that occurs twice counts twice
_SHORT = 64
MAX_REASON_CHARS = 2_000  # a reason is a sentence or two; events and records contain all of it
_LONGEST_INTEGER_BITS = 1024  # of an integer that is shown; its digits fill a line
_LONGEST_SECRET = 4_096  # masking reads this far beyond a cut, so that no part of a secret remains

MAX_CHARS, MAX_ITEMS, MAX_DEPTH = 10_000, 200, 12  # in a text; in a container; levels of containers
MAX_VALUES = 50_000
"""The most values in one shown value. Masking them takes a tenth of a second."""


class TooManyValues(Exception):
    """The value to show contains more than `MAX_VALUES` values, so it was not read completely."""


safe_text = mask_secrets
safe_url = mask_url
without_named_secrets = mask_named


def redact(
    value: Any,
    keys: Collection[str] = DEFAULT_REDACT_KEYS,
    *,
    max_chars: int | None = MAX_CHARS,
    max_items: int | None = MAX_ITEMS,
    max_depth: int = MAX_DEPTH,
    mask: Callable[[str], str] = mask_secrets,
) -> Any:
    """A copy of any value as plain JSON that is safe to show. Mappings stay mappings, and lists stay lists.

    Values under names of secrets are masked, and secrets in texts: API keys, bearer tokens, URL passwords.
    Texts longer than `max_chars`, containers longer than `max_items` and levels beyond `max_depth` are cut
    and marked as cut. If `max_items` is set, containers after the first `MAX_VALUES` values are cut, too.
    None means no limit; only the length of keys is always limited. A value that is not JSON becomes its text.
    `mask` masks each text; use `mask_prose` for the texts of errors and log lines.

    >>> redact({"apiKey": "sk-123", "input_tokens": 7, "note": "at redis://:pw@host/0"})
    {'apiKey': '***', 'input_tokens': 7, 'note': 'at redis://:***@host/0'}
    """
    parts = _DEFAULT_PARTS if keys is DEFAULT_REDACT_KEYS else parts_of(tuple(keys))
    return _Redaction(_rules_of(parts, max_chars, max_items, mask)).shown(value, max_depth)


def shown_json(
    payload: Mapping[str, Any], keys: Collection[str] = DEFAULT_REDACT_KEYS, *, is_whole: bool = False
) -> str:
    """A payload that is safe to show, as compact JSON.

    With `is_whole=True` it raises `TooManyValues` instead of cutting values.

    >>> shown_json({"token": "abc", "step": 3})
    '{"token":"***","step":3}'
    """
    rules = _DEFAULT_RULES if keys is DEFAULT_REDACT_KEYS else _rules_of_events(tuple(keys))
    redaction = _Redaction(rules, is_whole=is_whole)
    shown = (
        redaction.pairs(payload, MAX_DEPTH) if type(payload) is dict else redaction.shown(payload, MAX_DEPTH)
    )
    try:
        return to_json(shown).decode()
    except ValueError:  # half of a surrogate pair, which is not valid in UTF-8
        return dumps(replaced(shown))


def safe_message(text: str, max_chars: int | None = None) -> str:
    """The masked text of a foreign exception, cut to `max_chars` characters."""
    if max_chars is None:
        return mask_prose(text)
    return mask_prose(text[: max_chars + _LONGEST_SECRET])[:max_chars]


def shown_reason(reason: object) -> str:
    """A reason or a name from a user as masked text for events and records; '' for None."""
    return "" if reason is None else safe_message(text_of(reason), MAX_REASON_CHARS)


class _RedactionRules:
    """What is masked and cut, in the form in which it is applied to each value."""

    __slots__ = ("mask", "mask_short", "max_chars", "max_items", "max_values", "names", "parts", "short")

    def __init__(
        self,
        parts: tuple[str, ...],
        max_chars: int | None,
        max_items: int | None,
        mask: Callable[[str], str],
    ) -> None:
        self.parts = parts
        self.max_chars = max_chars
        self.max_items = max_items
        self.max_values = MAX_VALUES if max_items is not None else _MOST_VALUES
        self.mask = mask
        self.mask_short = _OF_SHORT_TEXTS.get(mask, mask)
        self.short = _SHORT if max_chars is None or max_chars >= _SHORT else max_chars
        self.names = _known_names.setdefault((parts, self.mask_short), {})


@lru_cache(maxsize=64)  # the settings of a process have few combinations
def _rules_of(
    parts: tuple[str, ...], max_chars: int | None, max_items: int | None, mask: Callable[[str], str]
) -> _RedactionRules:
    return _RedactionRules(parts, max_chars, max_items, mask)


@lru_cache(maxsize=16)
def _rules_of_events(keys: tuple[str, ...]) -> _RedactionRules:
    return _rules_of(parts_of(keys), MAX_CHARS, MAX_ITEMS, mask_prose)


class _Redaction:
    """The rules and the counter of one `redact` call.

    It is a class and not a closure, because closures would create reference cycles for the garbage collector.
    """

    __slots__ = ("_is_whole", "_left", "_rules")

    def __init__(self, rules: _RedactionRules, *, is_whole: bool = False) -> None:
        self._rules = rules
        self._left = rules.max_values
        self._is_whole = is_whole

    def shown(self, value: Any, depth: int) -> JsonValue:
        kind = type(value)
        if kind is list:  # before the abstract types, which take most of the time of a payload
            return self._items(value, depth) if depth else f"<{len(value)} more inside>"
        if kind is dict:
            return self.pairs(value, depth) if depth else f"<{len(value)} more inside>"
        if isinstance(value, str):
            return self._bounded(value)
        if value is None or isinstance(value, (bool, int)):
            return (
                value
                if value is None or SMALLEST_INTEGER <= value <= LARGEST_INTEGER
                else _integer_text(value)
            )
        if isinstance(value, float):
            return value if isfinite(value) else None
        if isinstance(value, (bytes, bytearray)):
            return f"<{len(value)} bytes>"
        if isinstance(value, BaseModel):
            try:
                value = value.model_dump()
            except Exception:  # noqa: BLE001 - a custom serializer may raise anything
                return self._bounded(text_of(value))
        if isinstance(value, Mapping):
            return self.pairs(value, depth) if depth else f"<{len(value)} more inside>"
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._items(value, depth) if depth else f"<{len(value)} more inside>"
        return self._bounded(text_of(value))

    def _is_too_many(self, count: int) -> bool:
        """Subtract the values of a container from the remaining ones; true if there are not enough."""
        most = self._rules.max_items
        self._left -= count if most is None or count < most else most
        return self._left < 0 and self._cuts(count)

    def _cuts(self, count: int) -> bool:
        """Whether a container of this size is cut, because no values are left."""
        if self._is_whole:
            raise TooManyValues
        return count > 0

    def pairs(self, mapping: Mapping[Any, Any], depth: int) -> JsonValue:
        """A mapping as it is shown; a text with its size, if its values exceed the limit."""
        # It runs for every event, so the most common types are checked first.
        out: dict[str, JsonValue] = {}
        rules, count = self._rules, len(mapping)
        mask_short, short, names = rules.mask_short, rules.short, rules.names
        most = count if rules.max_items is None else rules.max_items
        has_more = count > most
        self._left -= most if has_more else count
        if self._left < 0 and self._cuts(count):
            return f"<{count} more inside>"
        for key, item in mapping.items():
            if has_more and len(out) >= most:
                out["…"] = f"<{count - most} more>"
                break
            known = names.get(key) if type(key) is str else None
            under, name = known or self._named(key if isinstance(key, str) else text_of(key))
            kind = type(item)
            if under is not _NOT_SECRET and (under is _SECRET or kind is not int) and is_secret(under, item):
                out[name] = MASK
            elif kind is str and len(item) <= short:
                out[name] = mask_short(item)
            elif (
                (kind is int and SMALLEST_INTEGER <= item <= LARGEST_INTEGER)
                or item is None
                or kind is bool
                or (kind is float and isfinite(item))
            ):
                out[name] = item
            else:
                out[name] = self.shown(item, depth - 1)
        return out

    def _named(self, name: str) -> tuple[ValueKind, str]:
        """The kind of the values under a name, and the name as it is shown. Short names are remembered."""
        rules = self._rules
        under = value_kind(name, rules.parts)
        if len(name) > _SHORT:
            return under, self._key(name)
        found, names = (under, rules.mask_short(name)), rules.names
        if len(names) < _MAX_NAMES and len(name) <= _LONGEST_KNOWN and type(name) is str:
            names[name] = found
        return found

    def _items(self, sequence: Collection[Any], depth: int) -> JsonValue:
        """A list, tuple or set as it is shown; a text with its size, if its values exceed the limit."""
        if self._is_too_many(len(sequence)):
            return f"<{len(sequence)} more inside>"
        out: list[JsonValue] = []
        most = self._rules.max_items
        for item in sequence:
            if len(out) == most:
                out.append(f"<{len(sequence) - most} more>")
                break
            out.append(self.shown(item, depth - 1))
        return out

    def _key(self, name: str) -> str:
        mask = self._rules.mask
        return mask(name) if len(name) <= _LONGEST_KEY else _cut(name, _LONGEST_KEY, mask)

    def _bounded(self, text: str) -> str:
        rules = self._rules
        if rules.max_chars is None or len(text) <= rules.max_chars:
            return rules.mask_short(text) if len(text) <= _SHORT else rules.mask(text)
        return _cut(text, rules.max_chars, rules.mask)


def _integer_text(number: int) -> str:
    return str(number) if number.bit_length() <= _LONGEST_INTEGER_BITS else "<a very large integer>"


def _cut(text: str, max_chars: int, mask: Callable[[str], str]) -> str:
    head = mask(text[: max_chars + _LONGEST_SECRET])[:max_chars]
    return f"{head}… <{len(text) - max_chars} more characters>"


_NOT_SECRET, _SECRET = ValueKind.NOT_SECRET, ValueKind.SECRET
_DEFAULT_PARTS = parts_of(DEFAULT_REDACT_KEYS)
_OF_SHORT_TEXTS: dict[Callable[[str], str], Callable[[str], str]] = {
    mask_secrets: mask_short,
    mask_prose: mask_short_prose,
}
_known_names: dict[tuple[tuple[str, ...], Callable[[str], str]], dict[str, tuple[ValueKind, str]]] = {}
"""The kind of the values under each name, and the name as it is shown; by the parts of names of secrets."""


def _forget_names() -> None:
    """Forget how names are shown: one of them may contain the secret that became known now."""
    for names in list(_known_names.values()):
        names.clear()


on_secret_remembered(_forget_names)
_MAX_NAMES = 4_096  # names of fields are few; those of custom data are not kept beyond this
_LONGEST_KNOWN = 64
_DEFAULT_RULES = _rules_of(_DEFAULT_PARTS, MAX_CHARS, MAX_ITEMS, mask_prose)
