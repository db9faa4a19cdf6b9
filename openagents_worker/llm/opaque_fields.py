"""Opaque fields of a streamed reply: the only place that joins them. Their provider gets them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["StreamedField"]

JOINED_FIELDS = frozenset({"text", "summary", "data", "thinking"})
"""Fields of the items of a list that arrive in pieces."""


class StreamedField:
    """The values of one field, joined: texts and lists are continued, objects updated, others replaced.

    Neighbouring items of lists with one index and type are parts of one item. Adding a value costs the same,
    however long the field is.

    >>> field = StreamedField()
    >>> for text in ("a", "b"):
    ...     field.add([{"index": 0, "text": text}])
    >>> field.whole
    [{'index': 0, 'text': 'ab'}]
    """

    def __init__(self) -> None:
        self._value: Any = None
        self._texts: list[str] = []  # pieces of a text
        self._items: list[_Item] = []

    def add(self, value: Any) -> None:
        if isinstance(value, list):
            if not isinstance(self._value, list):
                self._items.clear()
            self._value = value
            for item in value:
                self._add_item(item)
        elif isinstance(value, str):
            if not isinstance(self._value, str):
                self._texts.clear()
            self._value = value
            self._texts.append(value)
        elif isinstance(value, dict) and isinstance(self._value, dict):
            self._value |= value
        else:
            self._value = dict(value) if isinstance(value, dict) else value

    def _add_item(self, value: Any) -> None:
        if self._items and self._items[-1].is_continued_by(value):
            self._items[-1].add(value)
        else:
            self._items.append(_Item(value))

    @property
    def whole(self) -> Any:
        """The joined value."""
        if isinstance(self._value, str):
            return "".join(self._texts)
        if isinstance(self._value, list):
            return [item.whole for item in self._items]
        return self._value


class _Item:
    """An item of a list, whose texts may arrive in pieces."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._texts: dict[str, list[str]] = {}
        self._is_copied = False

    def is_continued_by(self, value: Any) -> bool:
        known = self._value
        if not (isinstance(known, Mapping) and isinstance(value, Mapping)) or value.get("index") is None:
            return False
        return known.get("index") == value["index"] and known.get("type") == value.get("type")

    def add(self, value: Mapping[str, Any]) -> None:
        if not self._is_copied:
            self._value, self._is_copied = dict(self._value), True
        for name, more in value.items():
            known = self._value.get(name)
            if name in JOINED_FIELDS and isinstance(known, str) and isinstance(more, str):
                self._texts.setdefault(name, [known]).append(more)
            elif more is not None:
                self._value[name] = more
                self._texts.pop(name, None)

    @property
    def whole(self) -> Any:
        if not self._texts:
            return self._value
        return {**self._value, **{name: "".join(pieces) for name, pieces in self._texts.items()}}
