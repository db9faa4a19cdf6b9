"""Approvals: the only place that lists the calls that wait for an approval. The functions are plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypedDict

from openagents_worker.arguments import check_keywords, optional_text
from openagents_worker.errors import RecordUnreadable, RedisWrongType
from openagents_worker.jsontext import loads
from openagents_worker.models import Approval, RunRecord
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.index_pages import (
    CHUNK,
    Page,
    UnreadableEntry,
    check_limit,
    for_each_id,
    in_all_indexes,
    read_index_page,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import CODEC, Plan
from openagents_worker.store.records import RECORD_FIELDS, parse_record, record_plan
from openagents_worker.store.redis_errors import default_if_wrong_type, is_wrong_type
from openagents_worker.store.row_reads import ReadBy, RowRead, read_each

__all__ = ["ApprovalFilters", "count_asking_runs", "list_approvals", "run_approvals"]

INDEX = "approvals"
FEWEST_RUNS = 20  # in one round trip: those that were decided meanwhile are skipped
FILTERED_CHUNK = 2000  # ids that are looked up in the indexes of the filters: Redis needs a millisecond
_INDEX_OF = {"agent_id": "agent", "session_id": "session", "tenant": "tenant"}
"""The index of runs that each filter names."""
_ASK = f"{FactKind.ASK}:"


class ApprovalFilters(TypedDict, total=False):
    """Filters of a list of approvals. A run must match all of them. None: no filter."""

    agent_id: str | None
    session_id: str | None
    tenant: str | None


def list_approvals(
    keys: Keys,
    filters: ApprovalFilters,
    *,
    limit: int,
    cursor: str | None,
    read_by: ReadBy = ReadBy.COMMANDS,
) -> Plan[Page[Approval]]:
    """A page of the calls that wait for an approval. The run that asked last is the first.

    The calls of one run are on one page, so it may have a few more than `limit`. Raises `RequestInvalid` for
    an invalid limit, cursor or filter, and TypeError for an unknown filter.
    """
    check_keywords("a list of approvals", filters, _INDEX_OF)
    check_limit(limit)
    wanted = {name: optional_text(name, value) for name, value in filters.items() if value is not None}
    indexes = [f"{_INDEX_OF[name]}={value}" for name, value in wanted.items()]
    missing = limit
    codec: PayloadCodec = yield CODEC

    def read(ids: Sequence[str]) -> Plan[list[tuple[Approval, ...] | UnreadableEntry | None]]:
        nonlocal missing
        left = yield from in_all_indexes(keys, indexes, ids)
        found: dict[str, tuple[Approval, ...] | UnreadableEntry | None] = {}
        while left and missing > 0:  # what follows them in the index is not read
            count = min(missing, CHUNK)
            batch, left = left[:count], left[count:]
            some = yield from _approvals_of_runs(keys, batch, wanted, codec, read_by)
            missing -= sum(isinstance(each, tuple) for each in some.values())
            found |= some
        return [found.get(id_) for id_ in ids]

    # Nearly every entry is an item of the page, unless there are filters.
    chunk = FILTERED_CHUNK if wanted else min(max(limit, FEWEST_RUNS), CHUNK)
    page = yield from read_index_page(keys("index", INDEX), read, None, None, limit, cursor, chunk=chunk)
    return Page(
        tuple(approval for approvals in page for approval in approvals), page.next_cursor, page.problems
    )


def count_asking_runs(keys: Keys) -> Plan[int]:
    """A plan that returns the number of runs with calls that wait for an approval."""
    ((count,),) = yield from for_each_id([keys("index", INDEX)], lambda r, key: r.zcard(key))
    return int(default_if_wrong_type(count, 0))


def _approvals_of_runs(
    keys: Keys, ids: Sequence[str], wanted: Mapping[str, str | None], codec: PayloadCodec, read_by: ReadBy
) -> Plan[dict[str, tuple[Approval, ...] | UnreadableEntry | None]]:
    """The approvals of each of these runs; None if it does not match, or waits for none."""
    rows = yield from _records_and_facts(keys, ids, read_by)
    found: dict[str, tuple[Approval, ...] | UnreadableEntry | None] = {}
    asking: dict[str, tuple[RunRecord, list[str]]] = {}
    for id_, (values, names) in zip(ids, rows, strict=True):
        run = _asking_run(keys, id_, values, names, wanted, codec)
        if isinstance(run, tuple):
            asking[id_] = run
        else:
            found[id_] = run
    answers = yield from for_each_id(
        list(asking), lambda r, id_: r.hmget(keys("facts", id_), _ask_fields(asking[id_][1]))
    )
    for (id_, (record, calls)), (texts,) in zip(asking.items(), answers, strict=True):
        found[id_] = _approvals_or_problem(keys, record, calls, texts, codec)
    return found


def _records_and_facts(keys: Keys, ids: Sequence[str], read_by: ReadBy) -> Plan[list[tuple[Any, Any]]]:
    """The record and the names of the facts of each run. Each of the two may be an exception.

    Records may be large, so no script reads them: Redis would serve nobody else in the meantime.
    """

    def record(client: Any, id_: str) -> object:
        return client.hmget(keys("run", id_), RECORD_FIELDS)

    facts = RowRead("facts", (lambda r, id_: r.hkeys(keys("facts", id_)),))
    if read_by is ReadBy.COMMANDS:
        rows = yield from for_each_id(ids, record, *facts.commands)
        return [(values, names) for values, names in rows]
    records = yield from for_each_id(ids, record)
    all_names = yield from read_each(facts, ids, read_by)
    return [(values, names) for (values,), (names,) in zip(records, all_names, strict=True)]


def run_approvals(keys: Keys, run_id: str) -> Plan[list[Approval]]:
    """The calls of one run that wait for an approval, the oldest first. Raises `RunNotFound`."""
    codec: PayloadCodec = yield CODEC
    record = yield from record_plan(keys, run_id)
    calls = _pending_calls(record, (yield lambda r: r.hkeys(keys("facts", run_id))))
    if not calls:
        return []
    texts = yield lambda r: r.hmget(keys("facts", run_id), _ask_fields(calls))
    return list(_approvals(record, calls, texts, codec))


def _asking_run(
    keys: Keys,
    run_id: str,
    values: Any,
    names: Any,
    wanted: Mapping[str, str | None],
    codec: PayloadCodec,
) -> tuple[RunRecord, list[str]] | UnreadableEntry | None:
    """A run of the index and its calls that wait; None if it does not match, or waits for none."""
    for key, answer in ((keys("run", run_id), values), (keys("facts", run_id), names)):
        if is_wrong_type(answer):
            return UnreadableEntry(key, RedisWrongType.code)
        if isinstance(answer, Exception):
            raise answer
    try:
        record = parse_record(run_id, values, codec)
    except Exception as error:  # noqa: BLE001 - one broken record must not hide the others
        return UnreadableEntry(keys("run", run_id), getattr(error, "code", RecordUnreadable.code))
    if record is None or not _matches(record, wanted):
        return None
    calls = _pending_calls(record, names)
    return (record, calls) if calls else None


def _approvals_or_problem(
    keys: Keys, record: RunRecord, calls: Sequence[str], texts: Any, codec: PayloadCodec
) -> tuple[Approval, ...] | UnreadableEntry | None:
    """The approvals of a run of the index; None if they were decided in the meantime."""
    if isinstance(texts, Exception):
        raise texts
    try:
        return _approvals(record, calls, texts, codec) or None
    except Exception as error:  # noqa: BLE001 - as above
        return UnreadableEntry(keys("run", record.run_id), getattr(error, "code", RecordUnreadable.code))


def _matches(record: RunRecord, wanted: Mapping[str, str | None]) -> bool:
    return all(value == _attribute(record, name) for name, value in wanted.items())


def _attribute(record: RunRecord, name: str) -> str | None:
    if name == "tenant":
        return record.request.tenant if record.request is not None else None
    value: str = getattr(record, name)
    return value


def _pending_calls(record: RunRecord, names: Iterable[str]) -> list[str]:
    """The calls of the run that wait, from the names of its facts."""
    known = set(names)
    calls = [name.removeprefix(_ASK) for name in known if name.startswith(_ASK)]
    pending = [call for call in calls if f"{FactKind.APPROVAL}:{call}" not in known]
    return [] if record.state.is_terminal else pending


def _ask_fields(calls: Iterable[str]) -> list[str]:
    return [_ASK + call for call in calls]


def _approvals(
    record: RunRecord, calls: Sequence[str], texts: Sequence[str | None], codec: PayloadCodec
) -> tuple[Approval, ...]:
    with translate_parse_errors(WRITTEN, run_id=record.run_id):
        asked = [
            _approval(record, call, loads(codec.decode(text)))
            for call, text in zip(calls, texts, strict=True)
            if text is not None  # decided and taken since then
        ]
    return tuple(sorted(asked, key=lambda each: (each.requested_at, each.call_id)))


def _approval(record: RunRecord, call_id: str, asked: Mapping[str, Any]) -> Approval:
    expires_ms = asked.get("expires_ms")
    return Approval(
        run_id=record.run_id,
        call_id=call_id,
        agent_id=record.agent_id,
        session_id=record.session_id,
        tenant=_attribute(record, "tenant"),
        tool_id=asked["tool_id"],
        arguments=asked["arguments"],
        reason=asked.get("reason"),
        requested_at=datetime.fromtimestamp(asked["requested_ms"] / 1000, UTC),
        expires_at=datetime.fromtimestamp(expires_ms / 1000, UTC) if expires_ms else None,
        default_action=asked["default_action"],
    )
