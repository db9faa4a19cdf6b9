"""Redaction. The only place that decides what of a value may be shown: secrets are masked, sizes bounded.

What is masked where:

- The texts of errors, of whoever raised them, are masked where they become an error of this library, so in
  everything that is made of it: result, `RunFailed`, event, log, traceback, what the model is told. The same
  for reasons that people give (`cancel`, `resume`) and for URLs in settings.
- Events, log lines and what Flower shows are masked as a whole, whatever they hold.
- What a user, a tool or a model says (input, a tool's result, the answer) is masked in none of those places
  that *are* the conversation: journal, transcript, artifacts, state, the result's output. A tool that returns
  a key has told the model of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel, JsonValue
from pydantic_core import to_json

from openagents_worker.errors import text_of
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER, dumps, replaced
from openagents_worker.secret_forms import MASK, mask_secrets, mask_short, mask_url
from openagents_worker.secret_names import DEFAULT_REDACT_KEYS, Holds, holds, is_secret, parts_of
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
_MOST_VALUES = 100_000  # of all that one value holds; a list that stands in it twice counts twice
_SHORT = 64
MAX_REASON_CHARS = 2_000  # a reason is a sentence or two; events and records hold it whole
_LONGEST_INTEGER_BITS = 1024  # of one that is shown: its digits fill a line
_LONGEST_SECRET = 4_096  # a text is masked this far beyond its cut, so that no half of a secret is left

MAX_CHARS, MAX_ITEMS, MAX_DEPTH = 10_000, 200, 12  # of a text; of a container; of levels
MAX_VALUES = 50_000
"""Of one value that is shown: to mask so many takes a tenth of a second."""


class TooManyValues(Exception):
    """What is to be shown holds more than `MAX_VALUES` values; no more of them were looked at."""


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
    """A copy of any value as plain JSON, fit to be shown; a mapping stays one, a list too.

    Values under a secret's name are masked; so are keys, bearer tokens and URL passwords inside of texts.
    Texts longer than `max_chars`, containers longer than `max_items` and nesting deeper than `max_depth` are
    cut, and say so. So are containers beyond the first `MAX_VALUES` values of the whole (100,000 where
    `max_items` is None). None means no bound; a key's name is always cut. What is not JSON becomes its text.
    `mask` is what becomes of a text: `mask_prose` where texts are those of errors and log lines.

    >>> redact({"apiKey": "sk-123", "input_tokens": 7, "note": "at redis://:pw@host/0"})
    {'apiKey': '***', 'input_tokens': 7, 'note': 'at redis://:***@host/0'}
    """
    return _Redaction(_parts_of(keys), max_chars, max_items, mask).shown(value, max_depth)


def _parts_of(keys: Collection[str]) -> tuple[str, ...]:
    return _DEFAULT_PARTS if keys is DEFAULT_REDACT_KEYS else parts_of(tuple(keys))


def shown_json(
    payload: Mapping[str, Any], keys: Collection[str] = DEFAULT_REDACT_KEYS, *, is_whole: bool = False
) -> str:
    """A payload as it may be shown, as compact JSON. `is_whole`: raises `TooManyValues` where values are cut.

    >>> shown_json({"token": "abc", "step": 3})
    '{"token":"***","step":3}'
    """
    redaction = _Redaction(_parts_of(keys), MAX_CHARS, MAX_ITEMS, mask_prose, is_whole=is_whole)
    shown = redaction.shown(payload, MAX_DEPTH)
    try:
        return to_json(shown).decode()
    except ValueError:  # half of a surrogate pair, which nobody could read again
        return dumps(replaced(shown))


def safe_message(text: str, max_chars: int | None = None) -> str:
    """The text of somebody else's exception as it may be stored and shown, cut after so many characters."""
    if max_chars is None:
        return mask_prose(text)
    return mask_prose(text[: max_chars + _LONGEST_SECRET])[:max_chars]


def shown_reason(reason: object) -> str:
    """What somebody gives as a reason, or as their name, as it stands in events and records; None is ''."""
    return "" if reason is None else safe_message(text_of(reason), MAX_REASON_CHARS)


class _Redaction:
    """What is masked and where it is cut. No closures: their cycles would be the garbage collector's work."""

    __slots__ = ("_is_whole", "_left", "_mask", "_mask_short", "_max_chars", "_max_items", "_parts", "_short")

    def __init__(
        self,
        parts: tuple[str, ...],
        max_chars: int | None,
        max_items: int | None,
        mask: Callable[[str], str],
        *,
        is_whole: bool = False,
    ) -> None:
        self._left = MAX_VALUES if max_items is not None else _MOST_VALUES
        self._is_whole = is_whole
        self._mask = mask
        self._mask_short = _OF_SHORT_TEXTS.get(mask, mask)
        self._parts = parts
        self._max_chars = max_chars
        self._max_items = max_items
        self._short = _SHORT if max_chars is None or max_chars >= _SHORT else max_chars

    def shown(self, value: Any, depth: int) -> JsonValue:
        if isinstance(value, str):
            return self._bounded(value)
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
                return self._bounded(text_of(value))
        if isinstance(value, Mapping):
            return self._pairs(value, depth) if depth else f"<{len(value)} more inside>"
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._items(value, depth) if depth else f"<{len(value)} more inside>"
        return self._bounded(text_of(value))

    def _is_too_many(self, count: int) -> bool:
        """Whether a container has more values than may be looked at; else they are taken off."""
        most = self._max_items
        self._left -= count if most is None or count < most else most
        if self._left < 0 and self._is_whole:
            raise TooManyValues
        return self._left < 0 and count > 0

    def _pairs(self, mapping: Mapping[Any, Any], depth: int) -> JsonValue:
        if self._is_too_many(len(mapping)):
            return f"<{len(mapping)} more inside>"
        # It runs for every event: what most items are, is looked for first.
        out: dict[str, JsonValue] = {}
        parts, mask_short, short = self._parts, self._mask_short, self._short
        most = len(mapping) if self._max_items is None else self._max_items
        has_more = len(mapping) > most
        for key, item in mapping.items():
            if has_more and len(out) >= most:
                out["…"] = f"<{len(mapping) - most} more>"
                break
            name = key if type(key) is str or isinstance(key, str) else text_of(key)
            under, kind = holds(name, parts), type(item)
            name = mask_short(name) if len(name) <= _SHORT else self._key(name)
            if under is not _ANYTHING and (under is _A_SECRET or kind is not int) and is_secret(under, item):
                out[name] = MASK
            elif kind is str and len(item) <= short:
                out[name] = mask_short(item)
            elif (
                item is None or kind is bool or (kind is int and SMALLEST_INTEGER <= item <= LARGEST_INTEGER)
            ):
                out[name] = item
            else:
                out[name] = self.shown(item, depth - 1)
        return out

    def _items(self, sequence: Collection[Any], depth: int) -> JsonValue:
        if self._is_too_many(len(sequence)):
            return f"<{len(sequence)} more inside>"
        out: list[JsonValue] = []
        for item in sequence:
            if len(out) == self._max_items:
                out.append(f"<{len(sequence) - self._max_items} more>")
                break
            out.append(self.shown(item, depth - 1))
        return out

    def _key(self, name: str) -> str:
        return self._mask(name) if len(name) <= _LONGEST_KEY else _cut(name, _LONGEST_KEY, self._mask)

    def _bounded(self, text: str) -> str:
        if self._max_chars is None or len(text) <= self._max_chars:
            return self._mask_short(text) if len(text) <= _SHORT else self._mask(text)
        return _cut(text, self._max_chars, self._mask)


def _digits(number: int) -> str:
    return str(number) if number.bit_length() <= _LONGEST_INTEGER_BITS else "<a very large integer>"


def _cut(text: str, max_chars: int, mask: Callable[[str], str]) -> str:
    head = mask(text[: max_chars + _LONGEST_SECRET])[:max_chars]
    return f"{head}… <{len(text) - max_chars} more characters>"


_ANYTHING, _A_SECRET = Holds.ANYTHING, Holds.A_SECRET
_DEFAULT_PARTS = parts_of(DEFAULT_REDACT_KEYS)
_OF_SHORT_TEXTS: dict[Callable[[str], str], Callable[[str], str]] = {
    mask_secrets: mask_short,
    mask_prose: mask_short_prose,
}
