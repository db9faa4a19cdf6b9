"""Dead letters: the only place that reads the list of keys and queue items that were put aside.

Scripts put a key aside whose type is not the type of the key table. Workers put items of a queue aside that
are not messages. An entry is kept for as long as an ended run (`OPENAGENTS_RUN_TTL_S`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from openagents_worker.jsontext import loads
from openagents_worker.store.client import Plan
from openagents_worker.store.keys import KEYS, Keys, spec_of
from openagents_worker.store.redis_errors import is_wrong_type
from openagents_worker.store.scripts import mend_key

__all__ = [
    "MAX_ITEM_CHARS",
    "PutAside",
    "parse_entries",
    "put_key_aside",
    "read_put_aside",
    "item_as_text",
    "wrong_fixed_keys",
]

MAX_ITEM_CHARS = 16_384
"""The stored length of an item. The list has at most a thousand entries, so it takes at most 16 MB."""
MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class PutAside:
    """A key or a queue item that the library could not use.

    `key` is the key or queue where it was found, `code` the error code, `what` a description, and `since` the
    time. A key was renamed to `moved_to` ('' if it was left in place). `item` has the first 16,384 characters
    of a queue item.
    """

    key: str
    code: str
    what: str
    since: datetime
    moved_to: str = ""
    item: str = ""


def item_as_text(item: object) -> str:
    """The item of a queue as text: bytes that are not UTF-8 are escaped, and a long item is cut off."""
    text = item.decode("utf-8", "backslashreplace") if isinstance(item, bytes) else str(item)
    text = text.encode("utf-8", "backslashreplace").decode()
    more = f"… ({len(text):,} in all)" if len(text) > MAX_ITEM_CHARS else ""
    return text[:MAX_ITEM_CHARS] + more


def parse_entries(texts: Iterable[str]) -> tuple[PutAside, ...]:
    """Parse entries of the list (JSON). Entries that the library did not write are left out."""
    return tuple(entry for entry in map(_parse_entry, texts) if entry is not None)


def _parse_entry(text: str) -> PutAside | None:
    try:
        fields = loads(text)
        return PutAside(
            str(fields["key"]),
            str(fields["code"]),
            str(fields["what"]),
            datetime.fromtimestamp(int(fields["at_us"]) / 1_000_000, UTC),
            str(fields.get("moved_to", "")),
            str(fields.get("item", "")),
        )
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError):
        return None


def read_put_aside(keys: Keys) -> Plan[tuple[PutAside, ...]]:
    """A plan that returns the newest hundred entries."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.lrange(keys("aside"), 0, MAX_SHOWN - 1)
        return pipeline.execute(raise_on_error=False)

    [texts] = yield question
    if isinstance(texts, Exception):
        if not is_wrong_type(texts):
            raise texts
        return ()
    return parse_entries(texts)


def wrong_fixed_keys(keys: Keys) -> Plan[list[str]]:
    """A plan that returns the keys of a wrong type, among the keys without an id."""
    fixed = [spec for spec in KEYS if "{}" not in spec.template]

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for spec in fixed:
            pipeline.type(keys(spec.name))
        return pipeline.execute()

    found = yield question
    return [
        keys(spec.name) for spec, kind in zip(fixed, found, strict=True) if kind not in ("none", spec.type)
    ]


def put_key_aside(keys: Keys, key: str) -> Plan[bool]:
    """A plan that puts a key aside if its type is wrong.

    Returns False if the key must stay in place (`key_table.LEFT_IN_PLACE`) or does not belong to the library.
    """
    known = spec_of(key, keys.prefix) if key.startswith(f"{keys.prefix}:") else None
    if known is None:
        return False
    answer = yield mend_key(key=key, kind=known[0].type)
    return bool(answer != "LEFT")
