"""Index pages: the only place that reads an index page by page, with a cursor."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from openagents_worker.arguments import number_of, text_of_caller
from openagents_worker.errors import RequestInvalid
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import Plan
from openagents_worker.store.redis_errors import default_if_wrong_type, wrong_type_error

__all__ = [
    "CHUNK",
    "LATEST_MS",
    "MAX_LIMIT",
    "Page",
    "Problem",
    "UnreadableEntry",
    "check_limit",
    "for_each_id",
    "in_all_indexes",
    "read_index_page",
]

T = TypeVar("T")

MAX_LIMIT = 1000  # items of a page
LATEST_MS = 253_402_300_799_000  # the end of the year 9999, the largest `datetime`
CHUNK = 100  # entries per round trip: their records may be large
MAX_SCANNED = 10_000  # entries per page; a page with fewer matches ends there and has a cursor


@dataclass(frozen=True, slots=True)
class Problem:
    """A stored item that this version cannot read: its key, the error code, and when it was accepted."""

    key: str
    code: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list, newest first. `next_cursor` is the cursor of the next page, None on the last page.

    A page may have fewer items than requested, or none, although it is not the last page: at most 10,000 runs
    are examined for a page, and a filter may match only a few of them.

    `problems` are entries that were examined but cannot be read. They do not hide the other entries.
    """

    items: tuple[T, ...]
    next_cursor: str | None
    problems: tuple[Problem, ...] = ()

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class UnreadableEntry:
    key: str
    code: str


def read_index_page(
    key: str,
    read: Callable[[Sequence[str]], Plan[list[T | UnreadableEntry | None]]],
    since_ms: int | None,
    until_ms: int | None,
    limit: int,
    cursor: str | None,
    max_scanned: int | None = None,
    chunk: int = CHUNK,
) -> Plan[Page[T]]:
    """Read an index from the cursor on, in chunks of so many entries, until there are `limit` items.

    `read` loads the items for a list of ids: an item, None to skip it, or an unreadable entry.
    """
    check_limit(limit)
    min_score = "-inf" if since_ms is None else str(since_ms)
    max_score = "+inf" if until_ms is None else f"({until_ms}"
    after = None if cursor is None else _parse_cursor(cursor)
    found: list[T] = []
    problems: list[Problem] = []
    max_scanned = max_scanned or MAX_SCANNED
    chunk = min(chunk, max_scanned)
    for _ in range(max_scanned // chunk):
        entries, more = yield from _next_entries(key, min_score, max_score, after, chunk)
        items = (yield from read([id_ for id_, _ in entries])) if entries else []
        for (id_, score), item in zip(entries, items, strict=True):
            after = (score, id_)
            if isinstance(item, UnreadableEntry):
                since = datetime.fromtimestamp(min(max(score, 0), LATEST_MS) / 1000, UTC)
                problems.append(Problem(item.key, item.code, since))
            elif item is not None:
                found.append(item)
            if len(found) == limit:
                return Page(tuple(found), _cursor_after(after), tuple(problems))
        if not more:
            return Page(tuple(found), None, tuple(problems))
    return Page(tuple(found), _cursor_after(after) if after else None, tuple(problems))


def _next_entries(
    key: str, min_score: str, max_score: str, after: tuple[int, str] | None, chunk: int
) -> Plan[tuple[list[tuple[str, int]], bool]]:
    """The next entries after `after` (score, then id, both descending), and whether there are more."""
    if after is not None:
        max_score = str(after[0])
    entries: list[tuple[str, int]] = []
    offset, full = 0, True
    while full and not entries:
        found = yield _index_range(key, max_score, min_score, offset, chunk)
        full, offset = len(found) == chunk, offset + len(found)
        entries = [(id_, int(score)) for id_, score in found if math.isfinite(score)]
        if after is not None:
            entries = [
                (id_, score)
                for id_, score in entries
                if (score, id_.encode()) < (after[0], after[1].encode())
            ]
    return entries, full


def _index_range(key: str, max_score: str, min_score: str, offset: int, chunk: int) -> Callable[[Any], Any]:
    return lambda r: r.zrevrangebyscore(key, max_score, min_score, start=offset, num=chunk, withscores=True)


def check_limit(limit: int) -> None:
    """Raises `RequestInvalid` unless it is a number of entries of one page."""
    number_of("limit", limit, least=1, most=MAX_LIMIT)


_SCORE = re.compile("[0-9]{1,16}")
SHOWN_CHARS = 60


def _cursor_after(entry: tuple[int, str]) -> str:
    return f"{entry[0]}-{entry[1]}"


def _parse_cursor(cursor: str) -> tuple[int, str]:
    score, found, id_ = text_of_caller("cursor", cursor).partition("-")
    if not (found and id_ and _SCORE.fullmatch(score)):
        raise RequestInvalid(
            f"{cursor[:SHOWN_CHARS]!r} is not a valid cursor",
            hint="use the next_cursor of the previous page without changes",
        )
    return int(score), id_


def for_each_id(ids: Sequence[str], *commands: Callable[[Any, str], object]) -> Plan[list[list[Any]]]:
    """Send these commands for each id, all in one round trip. Returns a row of answers for each id.

    An answer may be an exception.
    """

    def send(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for id_ in ids:
            for command in commands:
                command(pipeline, id_)
        return pipeline.execute(raise_on_error=False)

    answers = yield send
    return [answers[at : at + len(commands)] for at in range(0, len(answers), len(commands))]


def in_all_indexes(keys: Keys, names: Sequence[str], ids: Sequence[str]) -> Plan[list[str]]:
    """The ids that are in all of these indexes: one command for each index."""
    if not names or not ids:
        return list(ids)
    answers = yield from for_each_id(names, lambda r, name: r.zmscore(keys("index", name), list(ids)))
    for name, (scores,) in zip(names, answers, strict=True):
        if default_if_wrong_type(scores, None) is None:
            raise wrong_type_error(keys("index", name))
    return [
        id_
        for id_, scores in zip(ids, zip(*(row for (row,) in answers), strict=True), strict=True)
        if None not in scores
    ]
