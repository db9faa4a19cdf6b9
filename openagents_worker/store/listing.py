"""Listing: the only place that reads the indexes of runs and sessions, and prunes expired entries.

The functions are plans, which both the sync and the async store can execute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Generic, TypedDict, TypeVar

from openagents_worker.arguments import number_of, optional_text, text_of_caller
from openagents_worker.errors import (
    RecordUnreadable,
    RedisUnreachable,
    RedisWrongType,
    RequestInvalid,
    text_of,
)
from openagents_worker.models import RunRecord, RunState
from openagents_worker.store.client import Plan
from openagents_worker.store.dead_letters import wrong_fixed_keys
from openagents_worker.store.keys import Keys
from openagents_worker.store.records import RECORD_FIELDS, parse_record
from openagents_worker.store.redis_errors import default_if_wrong_type, is_wrong_type, wrong_type_error
from openagents_worker.store.scripts import Pruned, prune

__all__ = [
    "MAX_LIMIT",
    "Page",
    "Problem",
    "RunFilter",
    "RunFilters",
    "SessionSummary",
    "list_problems",
    "list_runs",
    "list_sessions",
    "extra_indexes",
    "prune_indexes",
]

T = TypeVar("T")

ALL = "all"
SESSIONS = "sessions"
MAX_GLOB_CHARS = 200  # matching a glob takes time proportional to the square of its length
MAX_LIMIT = 1000  # items of a page
LATEST_MS = 253_402_300_799_000  # the end of the year 9999, the largest `datetime`
CHUNK = 100  # entries per round trip: their records may be large
PRUNED_PER_CALL = 500  # entries: Redis needs half a millisecond
MAX_PRUNE_CALLS = 1000
SCANNED_FOR_PROBLEMS = 1000  # records that are read completely while the caller waits
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
class SessionSummary:
    """A session in a list.

    `holder` is the run that occupies the session. `waiting`, `messages` and `artifacts` are counts.
    `last_run_ms` is the time at which the last run entered the session, in milliseconds since 1970.
    """

    session_id: str
    last_run_ms: int
    holder: str | None
    waiting: int
    messages: int
    artifacts: int


def extra_indexes(tenant: str | None, labels: Mapping[str, str]) -> list[str]:
    """The names of the indexes for the tenant and the labels of a run. The scripts add the other indexes."""
    lists = [f"label={name}={value}" for name, value in sorted(labels.items())]
    return [f"tenant={tenant}", *lists] if tenant is not None else lists


class RunFilters(TypedDict, total=False):
    """Filters of a list of runs. A run must match all of these filters. None: no filter."""

    state: RunState | str | Iterable[RunState | str] | None
    agent_id: str | None
    session_id: str | None
    tenant: str | None
    labels: Mapping[str, str] | None
    since: datetime | None
    """The time at which the run was accepted, by the clock of Redis. `until` is exclusive."""
    until: datetime | None
    code: str | None
    """A glob such as `llm.*` for the code of the error with which a run has failed or for which it waits."""


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Parsed `RunFilters`. Raises `RequestInvalid` for an invalid value."""

    states: frozenset[RunState]
    indexes: tuple[str, ...]  # a matching run is in all of them
    since_ms: int | None
    until_ms: int | None
    code: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.code, str) and len(self.code) > MAX_GLOB_CHARS:
            raise RequestInvalid(
                f"the glob in code has {len(self.code):,} characters; at most {MAX_GLOB_CHARS} are allowed",
                hint="a valid glob is, for example, llm.*",
            )

    @classmethod
    def of(cls, filters: RunFilters) -> RunFilter:
        lists = extra_indexes(
            optional_text("tenant", filters.get("tenant")), _parse_labels(filters.get("labels") or {})
        )
        for field, name in (("session_id", "session"), ("agent_id", "agent")):
            if (id_ := optional_text(field, filters.get(field))) is not None:
                lists.append(f"{name}={id_}")
        return cls(
            _parse_states(filters.get("state")),
            tuple(lists or [ALL]),
            _parse_time_ms("since", filters.get("since")),
            _parse_time_ms("until", filters.get("until")),
            optional_text("code", filters.get("code")),
        )

    def passes(self, record: RunRecord) -> bool:
        """Whether the run matches the filters that are not covered by the indexes."""
        if self.states and record.state not in self.states:
            return False
        return self.code is None or fnmatchcase(record.reason_code or "", self.code)


def _parse_labels(labels: Any) -> Mapping[str, str]:
    if not isinstance(labels, Mapping):
        raise RequestInvalid(f"labels must be a mapping of names to values, not {type(labels).__name__}")
    return {
        text_of_caller("the name of a label", name): text_of_caller(f"labels.{name}", value)
        for name, value in labels.items()
    }


def _parse_states(states: Any) -> frozenset[RunState]:
    try:
        return frozenset(map(RunState, [states] if isinstance(states, str) else states or ()))
    except (TypeError, ValueError) as error:
        raise RequestInvalid(text_of(error), hint=f"the states are {', '.join(RunState)}") from None


def _parse_time_ms(name: str, at: Any) -> int | None:
    try:
        return None if at is None else int(at.timestamp() * 1000)
    except (AttributeError, ValueError, OverflowError, OSError) as error:
        raise RequestInvalid(f"{name} is not a valid time: {error}", hint="pass a datetime") from None


def list_runs(
    keys: Keys, filters: RunFilter, *, limit: int, cursor: str | None, max_scanned: int | None = None
) -> Plan[Page[RunRecord]]:
    """A plan that returns a page of runs. At most `max_scanned` runs are examined (None: 10,000).

    Raises `RequestInvalid` for an invalid limit or cursor, `RedisWrongType` if an index is not readable.
    """
    names = filters.indexes
    counted = yield from _for_each_id(names, lambda r, name: r.zcard(keys("index", name)))
    for name, (count,) in zip(names, counted, strict=True):
        if default_if_wrong_type(count, None) is None:
            raise wrong_type_error(keys("index", name))
    sizes = [count for (count,) in counted]
    shortest, *others = [name for _, name in sorted(zip(sizes, names, strict=True))]

    def read(ids: Sequence[str]) -> Plan[list[RunRecord | _UnreadableEntry | None]]:
        answers = yield from _for_each_id(
            ids,
            lambda r, id_: r.hmget(keys("run", id_), RECORD_FIELDS),
            *(lambda r, id_, name=name: r.zscore(keys("index", name), id_) for name in others),
        )
        return [
            _matching_record(keys, id_, values, filters) if None not in scores else None
            for id_, (values, *scores) in zip(ids, answers, strict=True)
        ]

    index = keys("index", shortest)
    return (
        yield from _read_page(index, read, filters.since_ms, filters.until_ms, limit, cursor, max_scanned)
    )


def list_sessions(keys: Keys, *, limit: int, cursor: str | None) -> Plan[Page[SessionSummary]]:
    """A plan that returns a page of sessions, the one with the newest run first. Raises as `list_runs`."""
    key = keys("index", SESSIONS)

    def read(ids: Sequence[str]) -> Plan[list[SessionSummary | _UnreadableEntry | None]]:
        answers = yield from _for_each_id(
            ids,
            lambda r, id_: r.exists(keys("session", id_)),
            lambda r, id_: r.zscore(key, id_),
            lambda r, id_: r.hget(keys("session", id_), "holder"),
            lambda r, id_: r.zcard(keys("session_queue", id_)),
            lambda r, id_: r.llen(keys("transcript", id_)),
            lambda r, id_: r.llen(keys("artifacts", id_)),
        )
        return [_session_summary(keys, id_, row) for id_, row in zip(ids, answers, strict=True)]

    return (yield from _read_page(key, read, None, None, limit, cursor))


def list_problems(keys: Keys) -> Plan[tuple[Problem, ...]]:
    """A plan that returns unreadable data: among the newest 1,000 runs, and among the keys without an id."""
    seconds, _ = yield lambda r: r.time()
    found = [
        Problem(key, RedisWrongType.code, datetime.fromtimestamp(seconds, UTC))
        for key in (yield from wrong_fixed_keys(keys))
    ]
    nothing = RunFilter(frozenset(), (ALL,), None, None, code="\0")  # matches no run, so all are examined
    try:
        page = yield from list_runs(keys, nothing, limit=1, cursor=None, max_scanned=SCANNED_FOR_PROBLEMS)
    except RedisWrongType as error:
        return (*found, Problem(error.key, error.code, datetime.fromtimestamp(seconds, UTC)))
    return (*found, *page.problems)


@dataclass(frozen=True, slots=True)
class _UnreadableEntry:
    key: str
    code: str


def _matching_record(
    keys: Keys, run_id: str, values: Sequence[str | None], filters: RunFilter
) -> RunRecord | _UnreadableEntry | None:
    """The record if it matches. None if it does not, or if it has expired and is not pruned yet."""
    if is_wrong_type(values):
        return _UnreadableEntry(keys("run", run_id), RedisWrongType.code)
    try:
        record = parse_record(run_id, default_if_wrong_type(values, ()))
        return record if record is not None and filters.passes(record) else None
    except RedisUnreachable:
        raise
    except Exception as error:  # noqa: BLE001 - one broken record must not hide the others
        return _UnreadableEntry(keys("run", run_id), getattr(error, "code", RecordUnreadable.code))


def prune_indexes() -> Plan[int]:
    """A plan that removes expired runs and sessions from the indexes that are due, for about a second at
    most.

    Returns the number of removed entries.
    """
    removed, name, kept = 0, "", 0
    for _ in range(MAX_PRUNE_CALLS):
        pruned: Pruned = yield prune(limit=PRUNED_PER_CALL, name=name, kept=kept)
        removed, name, kept = removed + pruned.removed, pruned.name, pruned.kept
        if not pruned.looked:
            break
    return removed


# --- pages -----------------------------------------------------------------------------------------------


def _read_page(
    key: str,
    read: Callable[[Sequence[str]], Plan[list[T | _UnreadableEntry | None]]],
    since_ms: int | None,
    until_ms: int | None,
    limit: int,
    cursor: str | None,
    max_scanned: int | None = None,
) -> Plan[Page[T]]:
    """Read an index from the cursor on, in chunks, until there are `limit` items.

    `read` loads the items for a list of ids: an item, None to skip it, or an unreadable entry.
    """
    _check_limit(limit)
    min_score = "-inf" if since_ms is None else str(since_ms)
    max_score = "+inf" if until_ms is None else f"({until_ms}"
    after = None if cursor is None else _parse_cursor(cursor)
    found: list[T] = []
    problems: list[Problem] = []
    for _ in range((max_scanned or MAX_SCANNED) // CHUNK):
        entries, more = yield from _next_entries(key, min_score, max_score, after)
        items = (yield from read([id_ for id_, _ in entries])) if entries else []
        for (id_, score), item in zip(entries, items, strict=True):
            after = (score, id_)
            if isinstance(item, _UnreadableEntry):
                since = datetime.fromtimestamp(min(max(score, 0), LATEST_MS) / 1000, UTC)
                problems.append(Problem(item.key, item.code, since))
            elif item is not None:
                found.append(item)
            if len(found) == limit:
                return Page(tuple(found), _cursor(after), tuple(problems))
        if not more:
            return Page(tuple(found), None, tuple(problems))
    return Page(tuple(found), _cursor(after) if after else None, tuple(problems))


def _next_entries(
    key: str, min_score: str, max_score: str, after: tuple[int, str] | None
) -> Plan[tuple[list[tuple[str, int]], bool]]:
    """The next entries after `after` (score, then id, both descending), and whether there are more."""
    if after is not None:
        max_score = str(after[0])
    entries: list[tuple[str, int]] = []
    offset, full = 0, True
    while full and not entries:
        found = yield _index_range(key, max_score, min_score, offset)
        full, offset = len(found) == CHUNK, offset + len(found)
        entries = [(id_, int(score)) for id_, score in found if math.isfinite(score)]
        if after is not None:
            entries = [
                (id_, score)
                for id_, score in entries
                if (score, id_.encode()) < (after[0], after[1].encode())
            ]
    return entries, full


def _index_range(key: str, max_score: str, min_score: str, offset: int) -> Callable[[Any], Any]:
    return lambda r: r.zrevrangebyscore(key, max_score, min_score, start=offset, num=CHUNK, withscores=True)


def _check_limit(limit: int) -> None:
    number_of("limit", limit, least=1, most=MAX_LIMIT)


_SCORE = re.compile("[0-9]{1,16}")
SHOWN_CHARS = 60


def _cursor(entry: tuple[int, str]) -> str:
    return f"{entry[0]}-{entry[1]}"


def _parse_cursor(cursor: str) -> tuple[int, str]:
    score, found, id_ = text_of_caller("cursor", cursor).partition("-")
    if not (found and id_ and _SCORE.fullmatch(score)):
        raise RequestInvalid(
            f"{cursor[:SHOWN_CHARS]!r} is not a valid cursor",
            hint="use the next_cursor of the previous page without changes",
        )
    return int(score), id_


# --- queries ---------------------------------------------------------------------------------------------


def _for_each_id(ids: Sequence[str], *commands: Callable[[Any, str], object]) -> Plan[list[list[Any]]]:
    """Send these commands for each id, all in one round trip. Returns a row of answers for each id.

    An answer may be an exception.
    """

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for id_ in ids:
            for command in commands:
                command(pipeline, id_)
        return pipeline.execute(raise_on_error=False)

    answers = yield question
    return [answers[at : at + len(commands)] for at in range(0, len(answers), len(commands))]


def _session_summary(
    keys: Keys, session_id: str, row: Sequence[Any]
) -> SessionSummary | _UnreadableEntry | None:
    kinds = (None, ("index", SESSIONS), "session", "session_queue", "transcript", "artifacts")
    for kind, answer in zip(kinds, row, strict=True):
        if is_wrong_type(answer):
            key = keys(*kind) if isinstance(kind, tuple) else keys(kind or "session", session_id)
            return _UnreadableEntry(key, RedisWrongType.code)
        default_if_wrong_type(answer, None)
    exists, last_ms, holder, waiting, messages, artifacts = row
    if not exists or last_ms is None:
        return None
    return SessionSummary(session_id, int(last_ms), holder, waiting, messages, artifacts)
