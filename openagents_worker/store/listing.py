"""Listing: the only place that reads the indexes of runs and sessions, and prunes expired entries.

The functions are plans, which both the sync and the async store can execute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, TypedDict, TypeVar, assert_never

from openagents_worker.arguments import check_keywords, optional_text, text_of_caller
from openagents_worker.errors import (
    RecordUnreadable,
    RedisWrongType,
    RequestInvalid,
    text_of,
)
from openagents_worker.jsontext import loads
from openagents_worker.models import RunRecord, RunState
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.dead_letters import wrong_fixed_keys
from openagents_worker.store.index_pages import (
    CHUNK,
    MAX_LIMIT,
    Page,
    Problem,
    UnreadableEntry,
    check_limit,
    for_each_id,
    in_all_indexes,
    read_index_page,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.list_states import WITH_CODE, CompareBy, runs_in_states
from openagents_worker.store.plan import CODEC, Plan
from openagents_worker.store.records import RECORD_FIELDS, parse_record
from openagents_worker.store.redis_errors import default_if_wrong_type, is_wrong_type, wrong_type_error
from openagents_worker.store.row_reads import ReadBy, RowRead, read_each
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
SCRIPT_CHUNK = 2000  # states that a script compares: Redis needs two milliseconds
STATES_CHUNK = 500  # states and codes that are read in one round trip
PRUNED_PER_CALL = 500  # entries: Redis needs half a millisecond
MAX_PRUNE_CALLS = 1000
FEWEST_SESSIONS = 20  # in one round trip: expired ones are skipped
READ_FIELDS = (*RECORD_FIELDS, "lists")
SCANNED_FOR_PROBLEMS = 1000  # records that are read completely while the caller waits


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


def extra_indexes(
    tenant: str | None, labels: Mapping[str, str], parent_run_id: str | None = None
) -> list[str]:
    """The names of the indexes for the tenant, the labels and the parent of a run. The scripts add the other
    indexes."""
    lists = [f"label={name}={value}" for name, value in sorted(labels.items())]
    lists = [f"tenant={tenant}", *lists] if tenant is not None else lists
    return [f"parent={parent_run_id}", *lists] if parent_run_id is not None else lists


class RunFilters(TypedDict, total=False):
    """Filters of a list of runs. A run must match all of these filters. None: no filter."""

    state: RunState | str | Iterable[RunState | str] | None
    agent_id: str | None
    session_id: str | None
    tenant: str | None
    labels: Mapping[str, str] | None
    parent_run_id: str | None
    """The run that has delegated to the listed ones."""
    since: datetime | None
    """The time at which the run was accepted, by the clock of Redis. `until` is exclusive."""
    until: datetime | None
    code: str | None
    """A glob such as `llm.*` for the code of the error with which a run has failed or for which it waits."""


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Parsed `RunFilters`. Raises `RequestInvalid` for an invalid value, TypeError for an unknown filter."""

    states: frozenset[RunState]
    indexes: tuple[str, ...]  # a matching run is in all of them
    since_ms: int | None
    until_ms: int | None
    code: str | None = None
    id_part: str | None = None
    """A part of the id of the run."""

    def __post_init__(self) -> None:
        if isinstance(self.code, str) and len(self.code) > MAX_GLOB_CHARS:
            raise RequestInvalid(
                f"the glob in code has {len(self.code):,} characters; at most {MAX_GLOB_CHARS} are allowed",
                hint="a valid glob is, for example, llm.*",
            )

    @classmethod
    def of(cls, filters: RunFilters) -> RunFilter:
        check_keywords("a list of runs", filters, RunFilters.__annotations__)
        lists = extra_indexes(
            optional_text("tenant", filters.get("tenant")), _parse_labels(filters.get("labels") or {})
        )
        for field, name in (("session_id", "session"), ("agent_id", "agent"), ("parent_run_id", "parent")):
            if (id_ := optional_text(field, filters.get(field))) is not None:
                lists.append(f"{name}={id_}")
        return cls(
            _parse_states(filters.get("state")),
            tuple(lists or [ALL]),
            _parse_time_ms("since", filters.get("since")),
            _parse_time_ms("until", filters.get("until")),
            optional_text("code", filters.get("code")),
        )

    @property
    def needs_records(self) -> bool:
        """Whether only the record of a run shows if it matches."""
        return bool(self.states) or self.code is not None

    @property
    def possible_states(self) -> tuple[RunState, ...]:
        """The states that a matching run can have; empty: all of them."""
        if self.code is None:
            return tuple(self.states)
        return tuple(self.states & WITH_CODE if self.states else WITH_CODE)

    def covers(self, record: RunRecord, more: Sequence[str]) -> bool:
        """Whether the run is really in the indexes of the filter; `more` are those of its tenant and labels.

        An index may still have the entry of an expired run whose id another run has now.
        """
        own = {ALL, f"agent={record.agent_id}", f"session={record.session_id}", *more}
        return own.issuperset(self.indexes)

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
    """The states; empty for None, which means all of them. A list without states is refused: it would match
    no run."""
    if states is None:
        return frozenset()
    try:
        found = frozenset(map(RunState, [states] if isinstance(states, str) else states))
    except (TypeError, ValueError) as error:
        raise RequestInvalid(text_of(error), hint=f"the states are {', '.join(RunState)}") from None
    if not found:
        raise RequestInvalid("state contains no states", hint="leave it out for runs in all states")
    return found


def _parse_time_ms(name: str, at: Any) -> int | None:
    try:
        return None if at is None else int(at.timestamp() * 1000)
    except (AttributeError, ValueError, OverflowError, OSError) as error:
        raise RequestInvalid(f"{name} is not a valid time: {error}", hint="pass a datetime") from None


def list_runs(
    keys: Keys,
    filters: RunFilter,
    *,
    limit: int,
    cursor: str | None,
    max_scanned: int | None = None,
    compare_by: CompareBy = CompareBy.STATES,
) -> Plan[Page[RunRecord]]:
    """A plan that returns a page of runs. At most `max_scanned` runs are examined (None: 10,000).

    Raises `RequestInvalid` for an invalid limit or cursor, `RedisWrongType` if an index is not readable.
    """
    check_limit(limit)
    names = filters.indexes
    counted = yield from for_each_id(names, lambda r, name: r.zcard(keys("index", name)))
    for name, (count,) in zip(names, counted, strict=True):
        if default_if_wrong_type(count, None) is None:
            raise wrong_type_error(keys("index", name))
    sizes = [count for (count,) in counted]
    shortest, *others = [name for _, name in sorted(zip(sizes, names, strict=True))]

    codec: PayloadCodec = yield CODEC
    reads_all = filters.needs_records and compare_by is CompareBy.RECORDS
    missing = limit

    def read(ids: Sequence[str]) -> Plan[list[RunRecord | UnreadableEntry | None]]:
        nonlocal missing
        part = filters.id_part or ""
        wanted = yield from in_all_indexes(keys, others, [id_ for id_ in ids if part in id_])
        if wanted and filters.needs_records and not reads_all:
            states = filters.possible_states
            wanted = yield from runs_in_states(keys, wanted, states, filters.code, compare_by)
        found: dict[str, RunRecord | UnreadableEntry | None] = {}
        while wanted and missing > 0:  # what follows them in the index is not read
            count = CHUNK if reads_all else min(missing, CHUNK)
            batch, wanted = wanted[:count], wanted[count:]
            rows = yield from for_each_id(batch, lambda r, id_: r.hmget(keys("run", id_), READ_FIELDS))
            for id_, (values,) in zip(batch, rows, strict=True):
                found[id_] = _matching_record(keys, id_, values, filters, codec)
                missing -= isinstance(found[id_], RunRecord)
        return [found.get(id_) for id_ in ids]

    index, chunk = keys("index", shortest), _chunk(filters, compare_by)
    return (
        yield from read_index_page(
            index, read, filters.since_ms, filters.until_ms, limit, cursor, max_scanned, chunk
        )
    )


def _chunk(filters: RunFilter, compare_by: CompareBy) -> int:
    """How many entries of an index are read at a time."""
    match compare_by:
        case CompareBy.SCRIPT:
            return SCRIPT_CHUNK
        case CompareBy.STATES:
            return STATES_CHUNK if filters.needs_records else CHUNK
        case CompareBy.RECORDS:
            return CHUNK
        case _:
            assert_never(compare_by)


def list_sessions(
    keys: Keys, *, limit: int, cursor: str | None, read_by: ReadBy = ReadBy.COMMANDS
) -> Plan[Page[SessionSummary]]:
    """A plan that returns a page of sessions, the one with the newest run first. Raises as `list_runs`."""
    key = keys("index", SESSIONS)
    rows = RowRead(
        "session",
        (
            lambda r, id_: r.exists(keys("session", id_)),
            lambda r, id_: r.zscore(key, id_),
            lambda r, id_: r.hget(keys("session", id_), "holder"),
            lambda r, id_: r.zcard(keys("session_queue", id_)),
            lambda r, id_: r.llen(keys("transcript", id_)),
            lambda r, id_: r.llen(keys("artifacts", id_)),
        ),
    )

    def read(ids: Sequence[str]) -> Plan[list[SessionSummary | UnreadableEntry | None]]:
        answers = yield from read_each(rows, ids, read_by)
        return [_session_summary(keys, id_, row) for id_, row in zip(ids, answers, strict=True)]

    check_limit(limit)
    chunk = min(max(limit, FEWEST_SESSIONS), CHUNK)  # nearly every entry is an item of the page
    return (yield from read_index_page(key, read, None, None, limit, cursor, chunk=chunk))


def list_problems(keys: Keys) -> Plan[tuple[Problem, ...]]:
    """A plan that returns unreadable data: among the newest 1,000 runs, and among the keys without an id."""
    seconds, _ = yield lambda r: r.time()
    found = [
        Problem(key, RedisWrongType.code, datetime.fromtimestamp(seconds, UTC))
        for key in (yield from wrong_fixed_keys(keys))
    ]
    nothing = RunFilter(frozenset(), (ALL,), None, None, code="\0")  # matches no run, so all are examined
    try:
        page = yield from list_runs(
            keys,
            nothing,
            limit=1,
            cursor=None,
            max_scanned=SCANNED_FOR_PROBLEMS,
            compare_by=CompareBy.RECORDS,
        )
    except RedisWrongType as error:
        return (*found, Problem(error.key, error.code, datetime.fromtimestamp(seconds, UTC)))
    return (*found, *page.problems)


def _matching_record(
    keys: Keys, run_id: str, values: Any, filters: RunFilter, codec: PayloadCodec
) -> RunRecord | UnreadableEntry | None:
    """The record if it matches. None if it does not, or if it has expired and is not pruned yet."""
    if is_wrong_type(values):
        return UnreadableEntry(keys("run", run_id), RedisWrongType.code)
    if isinstance(values, Exception):
        raise values  # not an error of this record
    try:
        *values, lists = values
        record = parse_record(run_id, values, codec)
        if record is None or not filters.covers(record, loads(lists or "[]")):
            return None
        return record if filters.passes(record) else None
    except Exception as error:  # noqa: BLE001 - one broken record must not hide the others
        return UnreadableEntry(keys("run", run_id), getattr(error, "code", RecordUnreadable.code))


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


def _session_summary(
    keys: Keys, session_id: str, row: Sequence[Any]
) -> SessionSummary | UnreadableEntry | None:
    kinds = (None, ("index", SESSIONS), "session", "session_queue", "transcript", "artifacts")
    for kind, answer in zip(kinds, row, strict=True):
        if is_wrong_type(answer):
            key = keys(*kind) if isinstance(kind, tuple) else keys(kind or "session", session_id)
            return UnreadableEntry(key, RedisWrongType.code)
        default_if_wrong_type(answer, None)
    exists, last_ms, holder, waiting, messages, artifacts = row
    if not exists or last_ms is None:
        return None
    return SessionSummary(session_id, int(float(last_ms)), holder, waiting, messages, artifacts)
