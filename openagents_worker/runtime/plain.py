"""Plain values: what a program is given is what it will be given again, decoded from the journal."""

from __future__ import annotations

import json
from typing import Any

from openagents_worker.models import dumps

__all__ = ["plain"]

_LEAVES = frozenset({str, int, float, bool, type(None)})


def plain(value: Any) -> Any:
    """The value as its JSON is read back; the same object where that makes no difference.

    Raises TypeError or ValueError for what is not JSON.
    """
    return value if _is_plain(value) else json.loads(dumps(value))


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind is list:
        return all(type(item) in _LEAVES or _is_plain(item) for item in value)
    if kind is dict:
        return all(type(k) is str and (type(v) in _LEAVES or _is_plain(v)) for k, v in value.items())
    return False
