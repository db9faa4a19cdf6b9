"""Lists of runs and sessions. The only place that reads the indexes, and sees to it that they end.

What is to be asked is decided once, by plans that sync and async stores carry out.
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
from openagents_worker.store.records import RECORD_FIELDS, record_of
from openagents_worker.store.redis_errors import is_wrong_type, or_else, wrong_type_error
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
    "lists_of",
    "pruning",
]

T = TypeVar("T")

ALL = "all"
SESSIONS = "sessions"
MAX_GLOB_CHARS = 200  # to read a glob takes the square of its length
MAX_LIMIT = 1000
LATEST_MS = 253_402_300_799_000  # the end of the year 9999: what a datetime holds
CHUNK = 100  # entries a round trip: what they point at may be large
PRUNED_A_CALL = 500  # entries: half a millisecond of Redis
PRUNE_CALLS = 1000
LOOKED_AT_FOR_PROBLEMS = 1000  # of a whole record each time: somebody waits for it
MOST_LOOKED_AT = 10_000  # entries a page; one with few hits ends there and says where to go on


@dataclass(frozen=True, slots=True)
class Problem:
    """Something stored that this version cannot read: its key, the error's code, and when it was accepted."""

    key: str
    code: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of a list, newest first. `next_cursor` is what to ask for the next page with, None at the end.

    A page may have fewer items than were asked for, or none, and still not be the last: a filter that few
    runs pass is looked for through 10,000 runs a page.

    `problems` are the entries that were looked at and cannot be read; they keep no others from being listed.
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
    """A session in a list: `holder` is the run that works in it, `waiting` how many are behind that.

    `last_run_ms` is when the last run took its place, milliseconds since 1970.
    """

    session_id: str
    last_run_ms: int
    holder: str | None
    waiting: int
    messages: int
    artifacts: int


def lists_of(tenant: str | None, labels: Mapping[str, str]) -> list[str]:
    """The indexes of a run's tenant and labels; those of its agent and session are known to the scripts."""
    lists = [f"label={name}={value}" for name, value in sorted(labels.items())]
    return [f"tenant={tenant}", *lists] if tenant is not None else lists


class RunFilters(TypedDict, total=False):
    """What runs can be asked for by; all of what is given has to fit, and None asks for nothing."""

    state: RunState | str | Iterable[RunState | str] | None
    agent_id: str | None
    session_id: str | None
    tenant: str | None
    labels: Mapping[str, str] | None
    since: datetime | None
    """When they were accepted, by Redis's clock; `until` is exclusive."""
    until: datetime | None
    code: str | None
    """A glob, as in `llm.*`, for the code of the error that a run has ended with or is put off for."""


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs are wanted: those that pass all that is given. Raises `RequestInvalid` for a wrong state."""

    states: frozenset[RunState]
    indexes: tuple[str, ...]  # every wanted run is in each of them
    since_ms: int | None
    until_ms: int | None
    code: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.code, str) and len(self.code) > MAX_GLOB_CHARS:
            raise RequestInvalid(
                f"the glob of a code has {len(self.code):,} characters; {MAX_GLOB_CHARS} are allowed",
                hint="for example llm.*",
            )

    @classmethod
    def of(cls, given: RunFilters) -> RunFilter:
        lists = lists_of(optional_text("tenant", given.get("tenant")), _labels(given.get("labels") or {}))
        for field, name in (("session_id", "session"), ("agent_id", "agent")):
            if (id_ := optional_text(field, given.get(field))) is not None:
                lists.append(f"{name}={id_}")
        return cls(
            _states(given.get("state")),
            tuple(lists or [ALL]),
            _ms("since", given.get("since")),
            _ms("until", given.get("until")),
            optional_text("code", given.get("code")),
        )

    def passes(self, record: RunRecord) -> bool:
        """Whether the run is wanted; what the indexes say is not asked again."""
        if self.states and record.state not in self.states:
            return False
        return self.code is None or fnmatchcase(record.reason_code or "", self.code)


def _labels(given: Any) -> Mapping[str, str]:
    if not isinstance(given, Mapping):
        raise RequestInvalid(f"labels are names with their values, not {type(given).__name__}")
    return {
        text_of_caller("a label's name", name): text_of_caller(f"labels.{name}", value)
        for name, value in given.items()
    }


def _states(given: Any) -> frozenset[RunState]:
    try:
        return frozenset(map(RunState, [given] if isinstance(given, str) else given or ()))
    except (TypeError, ValueError) as error:
        raise RequestInvalid(text_of(error), hint=f"a state is one of {', '.join(RunState)}") from None


def _ms(name: str, at: Any) -> int | None:
    try:
        return None if at is None else int(at.timestamp() * 1000)
    except (AttributeError, ValueError, OverflowError, OSError) as error:
        raise RequestInvalid(f"{name} is not a time that can be used: {error}", hint="a datetime") from None


def list_runs(
    keys: Keys, wanted: RunFilter, *, limit: int, cursor: str | None, most: int | None = None
) -> Plan[Page[RunRecord]]:
    """A page of runs, looked for among `most` (None: 10,000). Raises `RequestInvalid`."""
    names = wanted.indexes
    counted = yield from _each(names, lambda r, name: r.zcard(keys("index", name)))
    for name, (count,) in zip(names, counted, strict=True):
        if or_else(count, None) is None:
            raise wrong_type_error(keys("index", name))
    sizes = [count for (count,) in counted]
    shortest, *others = [name for _, name in sorted(zip(sizes, names, strict=True))]

    def read(ids: Sequence[str]) -> Plan[list[RunRecord | _UnreadableEntry | None]]:
        rows = yield from _each(
            ids,
            lambda r, id_: r.hmget(keys("run", id_), RECORD_FIELDS),
            *(lambda r, id_, name=name: r.zscore(keys("index", name), id_) for name in others),
        )
        return [
            _wanted(keys, id_, values, wanted) if None not in scores else None
            for id_, (values, *scores) in zip(ids, rows, strict=True)
        ]

    index = keys("index", shortest)
    return (yield from _page(index, read, wanted.since_ms, wanted.until_ms, limit, cursor, most))


def list_sessions(keys: Keys, *, limit: int, cursor: str | None) -> Plan[Page[SessionSummary]]:
    """A page of sessions, the one with the newest run first. Raises as `list_runs` does."""
    key = keys("index", SESSIONS)

    def read(ids: Sequence[str]) -> Plan[list[SessionSummary | _UnreadableEntry | None]]:
        rows = yield from _each(
            ids,
            lambda r, id_: r.exists(keys("session", id_)),
            lambda r, id_: r.zscore(key, id_),
            lambda r, id_: r.hget(keys("session", id_), "holder"),
            lambda r, id_: r.zcard(keys("session_queue", id_)),
            lambda r, id_: r.llen(keys("transcript", id_)),
            lambda r, id_: r.llen(keys("artifacts", id_)),
        )
        return [_summary(keys, id_, row) for id_, row in zip(ids, rows, strict=True)]

    return (yield from _page(key, read, None, None, limit, cursor))


def list_problems(keys: Keys) -> Plan[tuple[Problem, ...]]:
    """What cannot be read among the 1,000 runs that were accepted last, and keys of a wrong type of which a
    cell has one each."""
    seconds, _ = yield lambda r: r.time()
    found = [
        Problem(key, RedisWrongType.code, datetime.fromtimestamp(seconds, UTC))
        for key in (yield from wrong_fixed_keys(keys))
    ]
    nothing = RunFilter(frozenset(), (ALL,), None, None, code="\0")  # no run has it: all are looked at
    try:
        page = yield from list_runs(keys, nothing, limit=1, cursor=None, most=LOOKED_AT_FOR_PROBLEMS)
    except RedisWrongType as error:
        return (*found, Problem(error.key, error.code, datetime.fromtimestamp(seconds, UTC)))
    return (*found, *page.problems)


@dataclass(frozen=True, slots=True)
class _UnreadableEntry:
    key: str
    code: str


def _wanted(
    keys: Keys, run_id: str, values: Sequence[str | None], wanted: RunFilter
) -> RunRecord | _UnreadableEntry | None:
    """A run that is gone is in a list until that is pruned."""
    if is_wrong_type(values):
        return _UnreadableEntry(keys("run", run_id), RedisWrongType.code)
    try:
        record = record_of(run_id, or_else(values, ()))
        return record if record is not None and wanted.passes(record) else None
    except RedisUnreachable:
        raise
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one record, the others are listed
        return _UnreadableEntry(keys("run", run_id), getattr(error, "code", RecordUnreadable.code))


def pruning() -> Plan[int]:
    """Takes runs and sessions that have expired out of the lists: what is due, and at most a second's work.

    Returns how many entries that were.
    """
    removed, name, kept = 0, "", 0
    for _ in range(PRUNE_CALLS):
        look: Pruned = yield prune(limit=PRUNED_A_CALL, name=name, kept=kept)
        removed, name, kept = removed + look.removed, look.name, look.kept
        if not look.looked:
            break
    return removed


# --- pages -----------------------------------------------------------------------------------------------


def _page(
    key: str,
    read: Callable[[Sequence[str]], Plan[list[T | _UnreadableEntry | None]]],
    since_ms: int | None,
    until_ms: int | None,
    limit: int,
    cursor: str | None,
    most_looked_at: int | None = None,
) -> Plan[Page[T]]:
    """Goes down the list from the cursor, chunk by chunk, until there are enough items."""
    _check_limit(limit)
    least = "-inf" if since_ms is None else str(since_ms)
    most = "+inf" if until_ms is None else f"({until_ms}"
    after = None if cursor is None else _place(cursor)
    found: list[T] = []
    problems: list[Problem] = []
    for _ in range((most_looked_at or MOST_LOOKED_AT) // CHUNK):
        entries, more = yield from _entries(key, least, most, after)
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


def _entries(
    key: str, least: str, most: str, after: tuple[int, str] | None
) -> Plan[tuple[list[tuple[str, int]], bool]]:
    """The next entries behind `after`, by score, then by id, both downwards; and whether there are more."""
    if after is not None:
        most = str(after[0])
    entries: list[tuple[str, int]] = []
    offset, full = 0, True
    while full and not entries:
        rows = yield _rows(key, most, least, offset)
        full, offset = len(rows) == CHUNK, offset + len(rows)
        entries = [(id_, int(score)) for id_, score in rows if math.isfinite(score)]
        if after is not None:
            entries = [
                (id_, score)
                for id_, score in entries
                if (score, id_.encode()) < (after[0], after[1].encode())
            ]
    return entries, full


def _rows(key: str, most: str, least: str, offset: int) -> Callable[[Any], Any]:
    return lambda r: r.zrevrangebyscore(key, most, least, start=offset, num=CHUNK, withscores=True)


def _check_limit(limit: int) -> None:
    number_of("limit, the items of a page,", limit, least=1, most=MAX_LIMIT)


_SCORE = re.compile("[0-9]{1,16}")
SHOWN_CHARS = 60


def _cursor(place: tuple[int, str]) -> str:
    return f"{place[0]}-{place[1]}"


def _place(cursor: str) -> tuple[int, str]:
    score, found, id_ = text_of_caller("cursor", cursor).partition("-")
    if not (found and id_ and _SCORE.fullmatch(score)):
        raise RequestInvalid(
            f"{cursor[:SHOWN_CHARS]!r} is not a valid cursor",
            hint="pass on the next_cursor of a page as it is",
        )
    return int(score), id_


# --- questions -------------------------------------------------------------------------------------------


def _each(ids: Sequence[str], *commands: Callable[[Any, str], object]) -> Plan[list[list[Any]]]:
    """Asks these commands of each id, all in one round trip; a row of answers, or of errors, for each id."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for id_ in ids:
            for command in commands:
                command(pipeline, id_)
        return pipeline.execute(raise_on_error=False)

    answers = yield question
    return [answers[at : at + len(commands)] for at in range(0, len(answers), len(commands))]


def _summary(keys: Keys, session_id: str, row: Sequence[Any]) -> SessionSummary | _UnreadableEntry | None:
    kinds = (None, ("index", SESSIONS), "session", "session_queue", "transcript", "artifacts")
    for kind, answer in zip(kinds, row, strict=True):
        if is_wrong_type(answer):
            key = keys(*kind) if isinstance(kind, tuple) else keys(kind or "session", session_id)
            return _UnreadableEntry(key, RedisWrongType.code)
        or_else(answer, None)
    exists, last_ms, holder, waiting, messages, artifacts = row
    if not exists or last_ms is None:
        return None
    return SessionSummary(session_id, int(last_ms), holder, waiting, messages, artifacts)
