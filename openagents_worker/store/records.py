"""Records: the only place that reads stored runs and sessions and turns them into values.

The functions that build a query and parse its answer are shared by the sync and the async readers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from openagents_worker.errors import RunNotFound, SessionNotFound
from openagents_worker.jsontext import loads
from openagents_worker.models import (
    ErrorDetails,
    RunArtifact,
    RunRecord,
    RunRequest,
    RunResult,
    RunState,
    RunUsage,
)
from openagents_worker.store.client import AsyncStore, Plan, Reader, Store
from openagents_worker.store.formats import (
    NEWEST_READ,
    WRITTEN,
    can_read,
    other_format_error,
    stored_format,
    translate_parse_errors,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import PageSize
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.states import STATES

__all__ = [
    "RECORD_FIELDS",
    "SessionStore",
    "SessionView",
    "aread_record",
    "aread_session",
    "aread_states",
    "check_task_options",
    "read_ids",
    "read_record",
    "read_session",
    "read_states",
    "parse_record",
    "parse_request",
    "run_not_found",
    "states_plan",
]

SESSION_KEYS = ("session", "session_queue", "transcript", "artifacts", "session_state")
# Messages or artifacts per command: reading a long transcript must not delay the commands of others.
MAX_PAGE_ITEMS = 200
FIRST_PAGE_ITEMS = 20  # the size of the items is not known yet: each may have a megabyte
STATES_PER_PIPELINE = 500
IDS_PER_PAGE = 1000  # run ids: 40 KB

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
    "last_error",
    "last_error_details",
    "request",
    "result",
    "format",
)


def parse_record(run_id: str, values: Sequence[str | None]) -> RunRecord | None:
    """The record from the values of `RECORD_FIELDS`. None if the run does not exist.

    Raises `OtherFormat` if another version wrote it and this version cannot read it, else `RecordUnreadable`.
    """
    field = {name: value or "" for name, value in zip(RECORD_FIELDS, values, strict=True)}
    if not field["state"]:
        return None
    with translate_parse_errors(stored_format(field["format"]), run_id=run_id):
        return _build_record(run_id, field)


def _build_record(run_id: str, field: Mapping[str, str]) -> RunRecord:
    state = RunState(field["state"])

    def count(name: str) -> int:
        return int(field[name] or 0)

    def time_ms(name: str) -> int | None:
        return int(field[name]) if field[name] else None

    return RunRecord(
        run_id=run_id,
        agent_id=field["agent"],
        session_id=field["session"],
        queue=field["queue"],
        state=state,
        life=count("life"),
        attempt=count("attempt"),
        steps=count("steps"),
        retries=max(count("retries"), count("retries_in_all")),
        recoveries=count("recoveries"),
        worker=field["owner"] or None,
        cancel_requested=field["cancel"] == "1",
        created_ms=time_ms("created"),
        started_ms=time_ms("started"),
        ended_ms=time_ms("ended") if state.is_terminal else None,
        due_ms=time_ms("due") if STATES[state].has_due else None,
        duration_ms=count("active_ms"),
        usage=RunUsage.model_validate_json(field["usage"] or "{}"),
        last_error=_last_error(field["last_error"], field["last_error_details"]),
        request=_request_or_none(
            field["request"], stored_format(field["format"]), is_over=bool(field["result"])
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
    with translate_parse_errors(WRITTEN, run_id=run_id):
        if text and not isinstance(loads(text), dict):
            raise TypeError("the task options are not a JSON object")


def run_not_found(run_id: str) -> RunNotFound:
    return RunNotFound(
        f"the run {run_id!r} does not exist",
        hint="it was never submitted, or it has expired (OPENAGENTS_RUN_TTL_S); check that "
        "OPENAGENTS_REDIS_URL and OPENAGENTS_KEY_PREFIX are the same as those of its producer",
        run_id=run_id,
    )


def read_record(store: Store, run_id: str) -> RunRecord:
    """Read the current record of a run. Raises `RunNotFound`."""
    values = store.ask(lambda r: r.hmget(store.keys("run", run_id), RECORD_FIELDS))
    return _require_record(run_id, parse_record(run_id, values))


async def aread_record(store: AsyncStore, run_id: str) -> RunRecord:
    """As `read_record`, for asyncio."""
    values = await store.ask(lambda r: r.hmget(store.keys("run", run_id), RECORD_FIELDS))
    return _require_record(run_id, parse_record(run_id, values))


def is_notify_pending(store: Store, run_id: str) -> bool:
    """Whether Celery still has to be notified of the end of the run. Linked tasks run only after this."""
    return bool(store.ask(lambda r: r.hexists(store.keys("run", run_id), "untold")))


def _require_record(run_id: str, record: RunRecord | None) -> RunRecord:
    if record is None:
        raise run_not_found(run_id)
    return record


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


async def aread_states(store: AsyncStore, run_ids: Sequence[str]) -> dict[str, RunState | None]:
    """As `read_states`, for asyncio."""
    return await store.execute(states_plan(store.keys, run_ids))


def _read_states(keys: Keys, run_ids: Sequence[str]) -> Callable[[Any], Any]:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for run_id in run_ids:
            pipeline.hget(keys("run", run_id), "state")
        return pipeline.execute(raise_on_error=False)

    return question


# --- sessions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session at one moment: its runs, and everything that completed runs have written.

    `holder` is the id of the run that occupies the session, or None. `waiting` has the ids of the waiting
    runs, the next one first. `transcript` has the messages, oldest first. `bytes` is the memory that the
    session takes in Redis (`MEMORY USAGE`, an estimate).
    """

    session_id: str
    holder: str | None
    waiting: tuple[str, ...]
    transcript: tuple[Mapping[str, Any], ...]
    artifacts: tuple[RunArtifact, ...]
    state: Mapping[str, Any]
    bytes: int


def read_session(store: Store, session_id: str) -> SessionView:
    """Read a whole session as of one moment, in pages. Raises `SessionNotFound`."""
    return store.execute(_session_plan(store.keys, session_id))


async def aread_session(store: AsyncStore, session_id: str) -> SessionView:
    """As `read_session`, for asyncio."""
    return await store.execute(_session_plan(store.keys, session_id))


def _session_plan(keys: Keys, session_id: str) -> Plan[SessionView]:
    """Reads short values and the lengths of the lists in one transaction, then the lists up to these lengths.

    This gives the state of one moment, because the lists only grow at their end. The exception is a queue of
    more than 1,000 runs: runs behind the first page may move up in the meantime.
    """

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.hgetall(keys("session", session_id))
        pipeline.hgetall(keys("session_state", session_id))
        pipeline.zrange(keys("session_queue", session_id), 0, IDS_PER_PAGE - 1)
        pipeline.llen(keys("transcript", session_id))
        pipeline.llen(keys("artifacts", session_id))
        for name in SESSION_KEYS:
            pipeline.memory_usage(keys(name, session_id))
        return pipeline.execute()

    replies = yield question
    if not any(replies):
        raise SessionNotFound(
            f"the session {session_id!r} does not exist",
            hint="its first run creates a session; it expires OPENAGENTS_SESSION_TTL_S after its last run",
            session_id=session_id,
        )
    record, state, waiting, message_count, artifact_count, *sizes = replies
    if len(waiting) == IDS_PER_PAGE:
        waiting += yield from read_ids(keys("session_queue", session_id), begin=IDS_PER_PAGE)
    transcript = yield from _items(keys("transcript", session_id), message_count)
    artifacts = yield from _items(keys("artifacts", session_id), artifact_count)
    with translate_parse_errors(stored_format(record.get("format")), session_id=session_id):
        return SessionView(
            session_id,
            record.get("holder"),
            tuple(dict.fromkeys(waiting)),
            tuple(map(loads, transcript)),
            tuple(map(RunArtifact.model_validate_json, artifacts)),
            {name: loads(value) for name, value in state.items()},
            sum(size or 0 for size in sizes),
        )


def read_ids(key: str, *, begin: int = 0) -> Plan[list[str]]:
    """A plan that returns the members of a sorted set from the rank `begin` on, read in pages."""
    found: list[str] = []
    while True:
        at = begin + len(found)
        page = yield lambda r, at=at: r.zrange(key, at, at + IDS_PER_PAGE - 1)
        found += page
        if len(page) < IDS_PER_PAGE:
            return found


def _items(key: str, count: int) -> Plan[list[str]]:
    """The first `count` items of a list, read in pages. Fewer if the list is deleted in the meantime."""
    items: list[str] = []
    size = PageSize(first=FIRST_PAGE_ITEMS, max_count=MAX_PAGE_ITEMS)
    while len(items) < count:
        at, to = len(items), min(len(items) + size.count, count)
        page = yield lambda r, at=at, to=to: r.lrange(key, at, to - 1)
        if not page:
            break
        size.learn(len(page), sum(map(len, page)))
        items += page
    return items


class SessionStore:
    """Reads parts of a session for the runtime. The lists only grow at their end, when a run finishes.

    `upto` is an earlier length of the list (recorded in step 0): with it, a replay reads the same items
    again. `last` limits the result to the newest items. Results are ordered oldest first.
    """

    def __init__(self, store: Reader) -> None:
        self._store = store

    async def load_messages(
        self, session_id: str, *, last: int | None = None, upto: int | None = None
    ) -> list[dict[str, Any]]:
        """Messages of the transcript."""
        texts = [text async for text in self._items("transcript", session_id, last, upto)]
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return list(map(loads, texts))

    async def list_artifacts(
        self, session_id: str, *, last: int | None = None, upto: int | None = None
    ) -> list[RunArtifact]:
        """Artifacts of the session."""
        texts = [text async for text in self._items("artifacts", session_id, last, upto)]
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return list(map(RunArtifact.model_validate_json, texts))

    async def count_messages(self, session_id: str) -> int:
        return await self._length("transcript", session_id)

    async def count_artifacts(self, session_id: str) -> int:
        return await self._length("artifacts", session_id)

    async def load_state_texts(self, session_id: str) -> dict[str, str]:
        """The state of the session: top-level key -> value as JSON text."""
        key = self._store.keys("session_state", session_id)
        texts: dict[str, str] = await self._store.ask(lambda r: r.hgetall(key))
        return texts

    async def _length(self, kind: str, session_id: str) -> int:
        key = self._store.keys(kind, session_id)
        return int(await self._store.ask(lambda r: r.llen(key)))

    async def _items(
        self, kind: str, session_id: str, last: int | None, upto: int | None
    ) -> AsyncIterator[str]:
        """Yield the items, read in pages, without items that are appended in the meantime."""
        end = await self._length(kind, session_id) if upto is None else upto
        at = 0 if last is None else max(0, end - last)
        key, size = (
            self._store.keys(kind, session_id),
            PageSize(first=FIRST_PAGE_ITEMS, max_count=MAX_PAGE_ITEMS),
        )
        while at < end:
            to = min(at + size.count, end)
            page = await self._page(key, at, to)
            size.learn(len(page), sum(map(len, page)))
            for item in page:
                yield item
            at = to

    async def _page(self, key: str, at: int, to: int) -> list[str]:
        return list(await self._store.ask(lambda r: r.lrange(key, at, to - 1)))
