"""Approvals: the only place that lists the calls that wait for an approval. The functions are plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypedDict

from openagents_worker.arguments import optional_text
from openagents_worker.errors import RecordUnreadable, RedisUnreachable, RedisWrongType
from openagents_worker.jsontext import loads
from openagents_worker.models import Approval, RunRecord
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.index_pages import Page, UnreadableEntry, for_each_id, read_index_page
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import CODEC, Plan
from openagents_worker.store.records import RECORD_FIELDS, parse_record, record_plan
from openagents_worker.store.redis_errors import default_if_wrong_type, is_wrong_type

__all__ = ["ApprovalFilters", "list_approvals", "run_approvals"]

INDEX = "approvals"


class ApprovalFilters(TypedDict, total=False):
    """Filters of a list of approvals. A run must match all of them. None: no filter."""

    agent_id: str | None
    session_id: str | None
    tenant: str | None


def list_approvals(
    keys: Keys, filters: ApprovalFilters, *, limit: int, cursor: str | None
) -> Plan[Page[Approval]]:
    """A page of the calls that wait for an approval. The run that asked last is the first.

    The calls of one run are on one page, so it may have a few more than `limit`. Raises `RequestInvalid` for
    an invalid limit, cursor or filter.
    """
    wanted = {name: optional_text(name, value) for name, value in filters.items() if value is not None}
    codec: PayloadCodec = yield CODEC

    def read(ids: Sequence[str]) -> Plan[list[tuple[Approval, ...] | UnreadableEntry | None]]:
        rows = yield from for_each_id(
            ids,
            lambda r, id_: r.hmget(keys("run", id_), RECORD_FIELDS),
            lambda r, id_: r.hkeys(keys("facts", id_)),
        )
        found: list[tuple[Approval, ...] | UnreadableEntry | None] = []
        for id_, (values, names) in zip(ids, rows, strict=True):
            found.append((yield from _approvals_or_problem(keys, id_, values, names, wanted, codec)))
        return found

    page = yield from read_index_page(keys("index", INDEX), read, None, None, limit, cursor)
    return Page(
        tuple(approval for approvals in page for approval in approvals), page.next_cursor, page.problems
    )


def run_approvals(keys: Keys, run_id: str) -> Plan[list[Approval]]:
    """The calls of one run that wait for an approval, the oldest first. Raises `RunNotFound`."""
    codec: PayloadCodec = yield CODEC
    record = yield from record_plan(keys, run_id)
    names = yield lambda r: r.hkeys(keys("facts", run_id))
    return list((yield from _approvals_of(keys, record, names, codec)))


def _approvals_or_problem(
    keys: Keys,
    run_id: str,
    values: Any,
    names: Any,
    wanted: Mapping[str, str | None],
    codec: PayloadCodec,
) -> Plan[tuple[Approval, ...] | UnreadableEntry | None]:
    """The approvals of a run of the index; None if it does not match, or waits for none."""
    for key, answer in ((keys("run", run_id), values), (keys("facts", run_id), names)):
        if is_wrong_type(answer):
            return UnreadableEntry(key, RedisWrongType.code)
    try:
        record = parse_record(run_id, default_if_wrong_type(values, ()), codec)
        if record is None or not _matches(record, wanted):
            return None
        return (yield from _approvals_of(keys, record, default_if_wrong_type(names, ()), codec)) or None
    except RedisUnreachable:
        raise
    except Exception as error:  # noqa: BLE001 - one broken record must not hide the others
        return UnreadableEntry(keys("run", run_id), getattr(error, "code", RecordUnreadable.code))


def _matches(record: RunRecord, wanted: Mapping[str, str | None]) -> bool:
    return all(value == _attribute(record, name) for name, value in wanted.items())


def _attribute(record: RunRecord, name: str) -> str | None:
    if name == "tenant":
        return record.request.tenant if record.request is not None else None
    value: str = getattr(record, name)
    return value


def _approvals_of(
    keys: Keys, record: RunRecord, names: Iterable[str], codec: PayloadCodec
) -> Plan[tuple[Approval, ...]]:
    known = set(names)
    prefix = f"{FactKind.ASK}:"
    calls = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    pending = [call for call in calls if f"{FactKind.APPROVAL}:{call}" not in known]
    if record.state.is_terminal or not pending:
        return ()
    texts = yield lambda r: r.hmget(keys("facts", record.run_id), [prefix + call for call in pending])
    with translate_parse_errors(WRITTEN, run_id=record.run_id):
        asked = [
            _approval(record, call, loads(codec.decode(text)))
            for call, text in zip(pending, texts, strict=True)
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
