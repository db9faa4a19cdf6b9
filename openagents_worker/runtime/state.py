"""State of a run: the session's state plus the run's own changes, which only its end writes back.

A record of a call holds the absolute value of every top-level key the call changed, or, for a list that
grew, what was appended: a growing list is not stored again at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from openagents_worker.models import dumps

__all__ = ["Overlay", "apply_changes", "changed_keys"]

_GONE = object()


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


def changed_keys(before: Mapping[str, str], state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a run's end writes: [key, JSON, key, JSON …] and the keys that are gone; `before` is JSON by key.

    Raises TypeError or ValueError when a value is not JSON.
    """
    written: list[str] = []
    for key, value in state.items():
        text = dumps(value)
        if before.get(key) != text:
            written += [key, text]
    return written, [key for key in before if key not in state]
