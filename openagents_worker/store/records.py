"""Records: the only place that reads stored runs and turns them into values.

The functions that build a query and parse its answer are shared by the sync and the async readers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from openagents_worker.errors import RecordUnreadable, RunNotFound
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER, loads
from openagents_worker.models import (
    ErrorDetails,
    RunRecord,
    RunRequest,
    RunResult,
    RunState,
    RunUsage,
)
from openagents_worker.store.client import AsyncStore, Plan, Store
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.facts import Facts
from openagents_worker.store.formats import (
    NEWEST_READ,
    WRITTEN,
    can_read,
    other_format_error,
    stored_format,
    translate_parse_errors,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.parking import parse_waiting
from openagents_worker.store.plan import CODEC
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.states import STATES

__all__ = [
    "RECORD_FIELDS",
    "aread_facts",
    "aread_record",
    "aread_states",
    "check_task_options",
    "ended_record",
    "read_record",
    "record_plan",
    "read_states",
    "parse_record",
    "parse_request",
    "run_not_found",
    "states_plan",
]

STATES_PER_PIPELINE = 500

# --- runs ------------------------------------------------------------------------------------------------

RECORD_FIELDS = (
    "state",
    "agent",
    "session",
    "queue",
    "owner",
    "life",
    "attempt",
    "steps",
    "retries",
    "retries_in_all",
    "recoveries",
    "cancel",
    "created",
    "started",
    "ended",
    "due",
    "active_ms",
    "usage",
    "usage_in_all",
    "last_error",
    "last_error_details",
    "waits",
    "request",
    "result",
    "format",
    "on_busy",
    "forked_from",
    "parent",
)


def parse_record(run_id: str, values: Sequence[str | None], codec: PayloadCodec) -> RunRecord | None:
    """The record from the stored values of `RECORD_FIELDS`. None if the run does not exist.

    Raises `OtherFormat` if another version wrote it and this version cannot read it, else `RecordUnreadable`.
    """
    if values[RECORD_FIELDS.index("state")] is None:
        return None  # the scripts ignore such a record, too
    field = {name: value or "" for name, value in zip(RECORD_FIELDS, values, strict=True)}
    with translate_parse_errors(stored_format(field["format"]), run_id=run_id):
        return _build_record(run_id, codec.decode_fields(field, "request", "result", "last_error_details"))


def _build_record(run_id: str, field: Mapping[str, str]) -> RunRecord:
    state = RunState(field["state"])

    def count(name: str) -> int:
        number = int(field[name] or 0)
        if not SMALLEST_INTEGER <= number <= LARGEST_INTEGER:
            raise ValueError(f"{name} does not fit into 64 bits")
        return number

    def time_ms(name: str) -> int | None:
        return count(name) if field[name] else None

    return RunRecord(
        run_id=run_id,
        agent_id=field["agent"],
        session_id=field["session"],
        queue=field["queue"],
        state=state,
        life=max(count("life"), 1),
        attempt=count("attempt"),
        steps=count("steps"),
        retries=max(count("retries"), count("retries_in_all")),
        recoveries=count("recoveries"),
        worker=field["owner"] or None,
        cancel_requested=field["cancel"] == "1",
        created_ms=time_ms("created"),
        started_ms=time_ms("started"),
        ended_ms=time_ms("ended") if state.is_terminal else None,
        due_ms=time_ms("due") if STATES[state].has_due or STATES[state].is_parked else None,
        duration_ms=count("active_ms"),
        usage=RunUsage.model_validate_json(
            (state.is_terminal and field["usage_in_all"]) or field["usage"] or "{}"
        ),
        waiting=parse_waiting(field["waits"]) if STATES[state].is_parked else (),
        forked_from=field["forked_from"] or None,
        parent_run_id=field["parent"] or None,
        last_error=_last_error(field["last_error"], field["last_error_details"]),
        request=_with_on_busy(
            _request_or_none(field["request"], stored_format(field["format"]), is_over=bool(field["result"])),
            field["on_busy"],
        ),
        result=RunResult[Any].model_validate_json(field["result"]) if field["result"] else None,
    )


def _last_error(code: str, details: str) -> ErrorDetails | None:
    """The error for which the run was last suspended. The previous version stores only its code."""
    if details:
        return ErrorDetails.model_validate_json(details)
    return ErrorDetails(code=code, message="", retryable=True) if code else None


def _request_or_none(text: str, format_: int, *, is_over: bool) -> RunRequest | None:
    """The request of the run. None if it has another format.

    None also if it cannot be parsed but the run is over: a caller that waits for the result does not need it.
    """
    try:
        return RunRequest.model_validate_json(text) if text else None
    except ValueError:
        if can_read(format_) and not is_over:
            raise
        return None


def _with_on_busy(request: RunRequest | None, on_busy: str) -> RunRequest | None:
    """The request with the value of `on_busy` that is stored outside of it."""
    return request.model_copy(update={"on_busy": on_busy}) if request and on_busy else request


def parse_request(run_id: str, text: str) -> RunRequest:
    """Parse the request of a run before its execution.

    Raises `OtherFormat` if it has a field that only a newer version knows, else `RecordUnreadable`.
    """
    with translate_parse_errors(WRITTEN, run_id=run_id):
        try:
            return RunRequest.model_validate_json(text)
        except ValidationError as error:
            is_newer = all(problem["type"] == "unknown_field" for problem in error.errors(include_url=False))
            if is_newer and loads(text).keys() >= {"agent_id", "session_id", "input_text"}:
                raise other_format_error(NEWEST_READ + 1, run_id=run_id) from error
            raise


def check_task_options(run_id: str, text: str) -> None:
    """Raises `RecordUnreadable` if the stored Celery options of a run (`canvas`) are not a JSON object."""
    if not text:
        return
    with translate_parse_errors(WRITTEN, run_id=run_id):
        if not isinstance(loads(text), dict):
            raise TypeError("the task options are not a JSON object")


def run_not_found(run_id: str) -> RunNotFound:
    return RunNotFound(
        f"the run {run_id!r} does not exist",
        hint="it was never submitted, or it has expired (OPENAGENTS_RUN_TTL_S); check that "
        "OPENAGENTS_REDIS_URL and OPENAGENTS_KEY_PREFIX are the same as those of its producer",
        run_id=run_id,
    )


def record_plan(keys: Keys, run_id: str) -> Plan[RunRecord]:
    """A plan that returns the current record of a run. Raises `RunNotFound`."""
    codec: PayloadCodec = yield CODEC
    values = yield lambda r: r.hmget(keys("run", run_id), RECORD_FIELDS)
    record = parse_record(run_id, values, codec)
    if record is None:
        raise run_not_found(run_id)
    return record


def ended_record(keys: Keys, run_id: str) -> Plan[RunRecord | None]:
    """A plan that returns the record of a run that has ended; None if it has not. Raises `RunNotFound`.

    A run whose record is unreadable will fail, so the caller waits for its end.
    """
    try:
        found = yield from record_plan(keys, run_id)
    except RecordUnreadable:
        state = (yield from states_plan(keys, [run_id]))[run_id]
        if state is None or not state.is_terminal:
            return None
        found = yield from record_plan(keys, run_id)  # the run may have ended between the two reads
    return found if found.state.is_terminal else None


def facts_plan(keys: Keys, run_id: str) -> Plan[Facts]:
    """A plan that returns the facts of a run; none if it does not exist."""
    codec: PayloadCodec = yield CODEC
    fields = yield lambda r: r.hgetall(keys("facts", run_id))
    return Facts({name: codec.decode(text) for name, text in fields.items()})


def aread_facts(store: AsyncStore, run_id: str) -> Awaitable[Facts]:
    """The facts of a run, for asyncio."""
    return store.execute(facts_plan(store.keys, run_id))


def read_record(store: Store, run_id: str) -> RunRecord:
    """Read the current record of a run. Raises `RunNotFound`."""
    return store.execute(record_plan(store.keys, run_id))


def aread_record(store: AsyncStore, run_id: str) -> Awaitable[RunRecord]:
    """As `read_record`, for asyncio."""
    return store.execute(record_plan(store.keys, run_id))


def is_notify_pending(store: Store, run_id: str) -> bool:
    """Whether Celery still has to be notified of the end of the run. Linked tasks run only after this."""
    return bool(store.ask(lambda r: r.hexists(store.keys("run", run_id), "untold")))


def states_plan(keys: Keys, run_ids: Sequence[str]) -> Plan[dict[str, RunState | None]]:
    """A plan that reads the states of many runs, 500 in a round trip.

    The state is None if the run does not exist or if its record cannot be read.
    """
    states: dict[str, RunState | None] = {}
    for at in range(0, len(run_ids), STATES_PER_PIPELINE):
        ids = run_ids[at : at + STATES_PER_PIPELINE]
        values = yield _read_states(keys, ids)
        states |= {id_: _parse_state(value) for id_, value in zip(ids, values, strict=True)}
    return states


def _parse_state(value: Any) -> RunState | None:
    """The state, or None if it cannot be parsed: an unreadable record must not hide the other states."""
    try:
        return RunState(default_if_wrong_type(value, None))
    except ValueError:
        return None


def read_states(store: Store, run_ids: Sequence[str]) -> dict[str, RunState | None]:
    """Read the states of runs, as `states_plan` describes."""
    return store.execute(states_plan(store.keys, run_ids))


def aread_states(store: AsyncStore, run_ids: Sequence[str]) -> Awaitable[dict[str, RunState | None]]:
    """As `read_states`, for asyncio."""
    return store.execute(states_plan(store.keys, run_ids))


def _read_states(keys: Keys, run_ids: Sequence[str]) -> Callable[[Any], Any]:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for run_id in run_ids:
            pipeline.hget(keys("run", run_id), "state")
        return pipeline.execute(raise_on_error=False)

    return question
