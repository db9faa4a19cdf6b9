"""The state of a run: the state of its session, with the changes of the run until its end writes them.

A record holds the new value of every top-level key that its call changed. For a list that grew it holds only
the appended items, so that a growing list is not stored again in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from openagents_worker.errors import StepTooLarge, text_of
from openagents_worker.jsontext import (
    ENVELOPE_LEVELS,
    MAX_NESTING,
    MAX_VALUES,
    NESTING_OF_OLD,
    dumps,
    has_at_most,
    loads,
    replaced,
)
from openagents_worker.runtime.storable import stored_part
from openagents_worker.store.formats import WRITTEN, translate_parse_errors

__all__ = ["CHANGE_LEVELS", "Overlay", "apply_changes", "changed_keys", "loaded_state", "stored_texts"]

_GONE = object()
LEVELS = MAX_NESTING + ENVELOPE_LEVELS + 1
"""Nesting levels of a state value. It can contain results of tools, which have `MAX_NESTING` themselves."""
CHANGE_LEVELS = 2
"""Nesting levels around a value in the changes of a record: `{key: {"set": value}}`."""


class Overlay(MutableMapping[str, Any]):
    """A view of a state that collects changes. Reading a dict or list returns a copy that may be changed."""

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
        """The changes by key: `{"set": value}`, `{"append": [...]}` or `{"gone": true}`."""
        changes_by_key: dict[str, Any] = {}
        for key, value in self._own.items():
            before = self._base.get(key, _GONE)
            if value is _GONE:
                if before is not _GONE:
                    changes_by_key[key] = {"gone": True}
            elif before is _GONE or _differs(key, value, before):
                grown = (
                    isinstance(value, list) and isinstance(before, list) and value[: len(before)] == before
                )
                changes_by_key[key] = {"append": value[len(before) :]} if grown else {"set": value}
        return changes_by_key


def _differs(key: str, value: Any, before: Any) -> bool:
    """Whether a value has changed. Raises `StepTooLarge` for one that is too large to be compared.

    A list that occurs twice in a value is compared twice. So comparing forty lists, each of which holds the
    one before twice, would never end.
    """
    if not has_at_most(value, MAX_VALUES):
        raise StepTooLarge(f"state key {text_of(key)!r} has more than {MAX_VALUES:,} values")
    return bool(value != before)


def apply_changes(state: MutableMapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Apply the changes of a record to the state of the run."""
    for key, change in changes.items():
        if "gone" in change:
            state.pop(key, None)
        elif "append" in change:
            state[key] = [*state.get(key, []), *change["append"]]
        else:
            state[key] = change["set"]


def loaded_state(texts: Mapping[str, str], session_id: str) -> dict[str, Any]:
    """The state of a session, from its values as JSON. Raises `RecordUnreadable`."""
    if not texts:
        return {}
    with translate_parse_errors(WRITTEN, session_id=session_id):
        return {key: loads(text) for key, text in texts.items()}


def stored_texts(before: Mapping[str, str], state: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Each key of a state with its value as JSON. `before` is the state at the start, JSON by key.

    Unchanged values are not checked: an older version may have stored values that are refused today. Raises
    `StepTooDeep` or `StepTooLarge`, naming the key.
    """
    for key in list(state):
        stored_text = before.get(key) if isinstance(key, str) else None
        if stored_text is not None and _is_json_of(stored_text, state[key]):
            yield key, stored_text
            continue
        pair = {key: state[key]}
        for name, value in stored_part(f"state key {text_of(key)!r}", pair, levels=LEVELS).items():
            yield name, dumps(value)


def _is_json_of(text: str, value: Any) -> bool:
    try:
        replaced(value, NESTING_OF_OLD)  # raises for a value whose JSON would be extremely large
        return dumps(value) == text
    except (TypeError, ValueError, RecursionError):
        return False


def changed_keys(before: Mapping[str, str], texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Changed keys as [key, JSON, key, JSON …], and removed keys: arguments of the script `finish`."""
    changed = [(key, text) for key, text in texts.items() if before.get(key) != text]
    return [part for pair in changed for part in pair], [key for key in before if key not in texts]
