"""What was put aside. The only place that reads the list of what nobody could use.

Scripts move a key there that has another type than it must have; workers put items of the broker there that
are not messages. Each is kept as long as a run is after its end, and can be read.
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
    "entries_of",
    "mending",
    "read_aside",
    "shown_item",
    "wrong_fixed_keys",
]

MAX_ITEM_CHARS = 16_384
"""Of an item that is put aside: a thousand of them take 16 MB of Redis at most."""
SHOWN_MOST = 100


@dataclass(frozen=True, slots=True)
class PutAside:
    """Something that nobody could use: where it was found, the error's code, what it was, and since when.

    A key stands under `moved_to` now, '' where it was left in place. `item` is what was in a queue, as text,
    its first 16,384 characters.
    """

    key: str
    code: str
    what: str
    since: datetime
    moved_to: str = ""
    item: str = ""


def shown_item(item: object) -> str:
    """An item of a queue as text that can be stored: what is not UTF-8 as escapes, and not too much."""
    text = item.decode("utf-8", "backslashreplace") if isinstance(item, bytes) else str(item)
    text = text.encode("utf-8", "backslashreplace").decode()
    more = f"… ({len(text):,} in all)" if len(text) > MAX_ITEM_CHARS else ""
    return text[:MAX_ITEM_CHARS] + more


def entries_of(texts: Iterable[str]) -> tuple[PutAside, ...]:
    """The entries of the list; one that was written by somebody else is left out."""
    return tuple(entry for entry in map(_entry, texts) if entry is not None)


def _entry(text: str) -> PutAside | None:
    try:
        said = loads(text)
        return PutAside(
            str(said["key"]),
            str(said["code"]),
            str(said["what"]),
            datetime.fromtimestamp(int(said["at_us"]) / 1_000_000, UTC),
            str(said.get("moved_to", "")),
            str(said.get("item", "")),
        )
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError):
        return None


def read_aside(keys: Keys) -> Plan[tuple[PutAside, ...]]:
    """The newest hundred of what was put aside."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.lrange(keys("aside"), 0, SHOWN_MOST - 1)
        return pipeline.execute(raise_on_error=False)

    [texts] = yield question
    if isinstance(texts, Exception):
        if not is_wrong_type(texts):
            raise texts
        return ()
    return entries_of(texts)


def wrong_fixed_keys(keys: Keys) -> Plan[list[str]]:
    """Keys of a wrong type, of those of which a cell has one each."""
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


def mending(keys: Keys, key: str) -> Plan[bool]:
    """Puts a key aside that has a wrong type; False where it is left in place, or is none of ours."""
    known = spec_of(key, keys.prefix) if key.startswith(f"{keys.prefix}:") else None
    if known is None:
        return False
    answer = yield mend_key(key=key, kind=known[0].type)
    return bool(answer != "LEFT")
