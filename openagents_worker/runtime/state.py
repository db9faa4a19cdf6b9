"""State of a run: the session's state plus the run's own changes, which only its end writes back.

A record of a call holds the absolute value of every top-level key the call changed, or, for a list that
grew, what was appended: a growing list is not stored again at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from openagents_worker.errors import text_of
from openagents_worker.jsontext import ENVELOPE_LEVELS, MAX_NESTING, NESTING_OF_OLD, dumps, replaced
from openagents_worker.runtime.storable import stored_part

__all__ = ["CHANGE_LEVELS", "Overlay", "apply_changes", "changed_keys", "stored_texts"]

_GONE = object()
LEVELS = MAX_NESTING + ENVELOPE_LEVELS + 1
"""Of a key with its value: a memory keeps what tools have given, which may have all levels itself."""
CHANGE_LEVELS = 2
"""Levels of a record's changes around a value: `{key: {"set": value}}`."""


class Overlay(MutableMapping[str, Any]):
    """A view of a state that keeps its changes to itself: what a value's reader alters is a copy."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self._base = base
        self._own: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self._own:
            if self._own[key] is _GONE:
                raise KeyError(key)
            return self._own[key]
        value = self._base[key]
        if isinstance(value, dict | list):
            value = self._own[key] = copy.deepcopy(value)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._own[key] = value

    def __delitem__(self, key: str) -> None:
        self[key]
        self._own[key] = _GONE

    def __iter__(self) -> Iterator[str]:
        yield from (k for k in self._base if self._own.get(k) is not _GONE)
        yield from (k for k, v in self._own.items() if k not in self._base and v is not _GONE)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def changes(self) -> dict[str, Any]:
        """What was changed, by key: `{"set": value}`, `{"append": [...]}` or `{"gone": true}`."""
        found: dict[str, Any] = {}
        for key, value in self._own.items():
            before = self._base.get(key, _GONE)
            if value is _GONE:
                if before is not _GONE:
                    found[key] = {"gone": True}
            elif before is _GONE or value != before:
                grown = (
                    isinstance(value, list) and isinstance(before, list) and value[: len(before)] == before
                )
                found[key] = {"append": value[len(before) :]} if grown else {"set": value}
        return found


def apply_changes(state: MutableMapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Carry a record's changes into the run's state."""
    for key, change in changes.items():
        if "gone" in change:
            state.pop(key, None)
        elif "append" in change:
            state[key] = [*state.get(key, []), *change["append"]]
        else:
            state[key] = change["set"]


def stored_texts(before: Mapping[str, str], state: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Each key of a state with the JSON that its end stores; `before` is the JSON by key that it began with.

    What is as before stays so, also where an older version has stored what would be refused today. Raises
    `StepTooDeep` or `StepTooLarge` that names the key.
    """
    for key in list(state):
        known = before.get(key) if isinstance(key, str) else None
        if known is not None and _is_text_of(known, state[key]):
            yield key, known
            continue
        pair = {key: state[key]}
        for name, value in stored_part(f"state key {text_of(key)!r}", pair, levels=LEVELS).items():
            yield name, dumps(value)


def _is_text_of(text: str, value: Any) -> bool:
    try:
        replaced(value, NESTING_OF_OLD)  # a list that stands in it again and again may have no end as text
        return dumps(value) == text
    except (TypeError, ValueError, RecursionError):
        return False


def changed_keys(before: Mapping[str, str], texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What a run's end writes: [key, JSON, key, JSON …] and the keys that are gone; both are JSON by key."""
    changed = [(key, text) for key, text in texts.items() if before.get(key) != text]
    return [part for pair in changed for part in pair], [key for key in before if key not in texts]
