"""Run figures: the only place that reads what the newest runs took, without their requests and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import RecordUnreadable, RedisWrongType
from openagents_worker.models import RunRecord
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.index_pages import Page, UnreadableEntry, read_index_page
from openagents_worker.store.keys import Keys
from openagents_worker.store.list_states import WITH_CODE, stored_end_code
from openagents_worker.store.plan import CODEC, Plan
from openagents_worker.store.records import RECORD_FIELDS, parse_record
from openagents_worker.store.redis_errors import is_wrong_type
from openagents_worker.store.row_reads import ReadBy, RowRead, read_each

__all__ = ["RunFigures", "newest_figures"]

_PAYLOADS = ("request", "result", "last_error_details")
_FIELDS = (*(name for name in RECORD_FIELDS if name not in _PAYLOADS), "end_code")


@dataclass(frozen=True, slots=True)
class RunFigures:
    """A run, whose record has no request and no result here. `code` is what `reason_code` is with them."""

    record: RunRecord
    code: str | None


def newest_figures(keys: Keys, count: int) -> Plan[Page[RunFigures]]:
    """A plan that returns the runs that were accepted last, at most `count`, newest first, in a few commands.

    Raises `RedisWrongType` if the index is not readable.
    """
    codec: PayloadCodec = yield CODEC

    def read(ids: Sequence[str]) -> Plan[list[RunFigures | UnreadableEntry | None]]:
        fields = yield from _read_fields(keys, ids, _FIELDS)
        found = {id_: _figures(keys, id_, fields[id_], codec) for id_ in ids}
        # An earlier version has ended these. It stored the code only in the result, which is small for them.
        without = [id_ for id_, run in found.items() if isinstance(run, RunFigures) and _lacks_code(run)]
        results = yield from _read_fields(keys, without, ("result",))
        for id_ in without:
            found[id_] = _figures(keys, id_, _joined(fields[id_], results[id_]), codec)
        return [found[id_] for id_ in ids]

    return (
        yield from read_index_page(keys("index", "all"), read, None, None, count, None, count, chunk=count)
    )


def _read_fields(keys: Keys, ids: Sequence[str], names: tuple[str, ...]) -> Plan[dict[str, Any]]:
    """The fields of each run by name, or an exception."""
    row = RowRead("run", (lambda r, id_: r.hmget(keys("run", id_), names),), words=names)
    rows = yield from read_each(row, ids, ReadBy.SCRIPT)
    return {
        id_: values if isinstance(values, Exception) else dict(zip(names, values, strict=True))
        for id_, (values,) in zip(ids, rows, strict=True)
    }


def _joined(fields: Any, more: Any) -> Any:
    return more if isinstance(more, Exception) else {**fields, **more}


def _figures(
    keys: Keys, run_id: str, fields: Any, codec: PayloadCodec
) -> RunFigures | UnreadableEntry | None:
    """A run of the index; None if it has expired and is not pruned yet."""
    if is_wrong_type(fields):
        return UnreadableEntry(keys("run", run_id), RedisWrongType.code)
    if isinstance(fields, Exception):
        raise fields
    try:
        record = parse_record(run_id, [fields.get(name) for name in RECORD_FIELDS], codec)
    except Exception as error:  # noqa: BLE001 - one broken record must not hide the others
        return UnreadableEntry(keys("run", run_id), getattr(error, "code", RecordUnreadable.code))
    return RunFigures(record, _code(record, fields)) if record is not None else None


def _code(record: RunRecord, fields: Mapping[str, str | None]) -> str | None:
    code = stored_end_code(fields["end_code"], fields["life"]) if record.state.is_terminal else None
    return code or record.reason_code


def _lacks_code(run: RunFigures) -> bool:
    return run.code is None and run.record.state in WITH_CODE
