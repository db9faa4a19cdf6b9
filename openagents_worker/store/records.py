"""Reading what the scripts wrote. The only place that turns stored runs and sessions back into values.

Each answer is asked for and parsed by one pair of functions, which the sync and the async reader share.
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
    is_read,
    other_format,
    reading,
    stored_format,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import PageSize
from openagents_worker.store.redis_errors import or_else
from openagents_worker.store.states import STATES

__all__ = [
    "RECORD_FIELDS",
    "SessionStore",
    "SessionView",
    "aread_record",
    "aread_session",
    "aread_states",
    "check_canvas",
    "ids_of",
    "read_record",
    "read_session",
    "read_states",
    "record_of",
    "request_of",
    "run_not_found",
    "states_of",
]

SESSION_KEYS = ("session", "session_queue", "transcript", "artifacts", "session_state")
PAGE = 200  # messages or artifacts a command: a long transcript must not hold up everybody else's commands
FIRST_PAGE = 20  # before it is known how large they are: a megabyte each, at worst
STATES_A_PIPELINE = 500
IDS_A_PAGE = 1000  # of runs: 40 KB

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


def record_of(run_id: str, values: Sequence[str | None]) -> RunRecord | None:
    """The record from the values of `RECORD_FIELDS`; None when there is no such run.

    Raises `OtherFormat` for one of another version with something in it that this one cannot read.
    """
    field = {name: value or "" for name, value in zip(RECORD_FIELDS, values, strict=True)}
    if not field["state"]:
        return None
    with reading(stored_format(field["format"]), run_id=run_id):
        return _record(run_id, field)


def _record(run_id: str, field: Mapping[str, str]) -> RunRecord:
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
        request=_request(field["request"], stored_format(field["format"]), is_over=bool(field["result"])),
        result=RunResult[Any].model_validate_json(field["result"]) if field["result"] else None,
    )


def _last_error(code: str, details: str) -> ErrorDetails | None:
    """What the run was last put off for. A worker of the version before stores the code alone."""
    if details:
        return ErrorDetails.model_validate_json(details)
    return ErrorDetails(code=code, message="", retryable=True) if code else None


def _request(text: str, format_: int, *, is_over: bool) -> RunRequest | None:
    """The run's request; None also for one of another format, and for one that cannot be read of a run that
    has failed by it: who waits for the result can do without."""
    try:
        return RunRequest.model_validate_json(text) if text else None
    except ValueError:
        if is_read(format_) and not is_over:
            raise
        return None


def request_of(run_id: str, text: str) -> RunRequest:
    """The request of a run that is to be executed. Raises `RecordUnreadable`, and `OtherFormat` for one with
    a field that only a newer version knows."""
    with reading(WRITTEN, run_id=run_id):
        try:
            return RunRequest.model_validate_json(text)
        except ValidationError as error:
            is_newer = all(problem["type"] == "unknown_field" for problem in error.errors(include_url=False))
            if is_newer and loads(text).keys() >= {"agent_id", "session_id", "input_text"}:
                raise other_format(NEWEST_READ + 1, run_id=run_id) from error
            raise


def check_canvas(run_id: str, text: str) -> None:
    """Raises `RecordUnreadable` for what is kept of a run's messages, where that is not a JSON object."""
    with reading(WRITTEN, run_id=run_id):
        if text and not isinstance(loads(text), dict):
            raise TypeError("the options of its messages are not an object")


def run_not_found(run_id: str) -> RunNotFound:
    return RunNotFound(
        f"no run {run_id!r} is known here",
        hint="never submitted, or its OPENAGENTS_RUN_TTL_S is over; are OPENAGENTS_REDIS_URL and "
        "OPENAGENTS_KEY_PREFIX those of its producer?",
        run_id=run_id,
    )


def read_record(store: Store, run_id: str) -> RunRecord:
    """The run as it stands now. Raises `RunNotFound`."""
    values = store.ask(lambda r: r.hmget(store.keys("run", run_id), RECORD_FIELDS))
    return _found(run_id, record_of(run_id, values))


async def aread_record(store: AsyncStore, run_id: str) -> RunRecord:
    """The run as it stands now. Raises `RunNotFound`."""
    values = await store.ask(lambda r: r.hmget(store.keys("run", run_id), RECORD_FIELDS))
    return _found(run_id, record_of(run_id, values))


def is_notify_pending(store: Store, run_id: str) -> bool:
    """Whether Celery is still to be told of the run's end, and so what is linked to it still to be called."""
    return bool(store.ask(lambda r: r.hexists(store.keys("run", run_id), "untold")))


def _found(run_id: str, record: RunRecord | None) -> RunRecord:
    if record is None:
        raise run_not_found(run_id)
    return record


def states_of(keys: Keys, run_ids: Sequence[str]) -> Plan[dict[str, RunState | None]]:
    """The states of many runs in few round trips; None for a run that is not known.

    Raises `RecordUnreadable` for a state that there is not.
    """
    states: dict[str, RunState | None] = {}
    for at in range(0, len(run_ids), STATES_A_PIPELINE):
        ids = run_ids[at : at + STATES_A_PIPELINE]
        values = yield _states(keys, ids)
        states |= {id_: _state(value) for id_, value in zip(ids, values, strict=True)}
    return states


def _state(value: Any) -> RunState | None:
    """None also for a record that cannot be read: it must not keep the states of others from being known."""
    try:
        return RunState(or_else(value, None))
    except ValueError:
        return None


def read_states(store: Store, run_ids: Sequence[str]) -> dict[str, RunState | None]:
    """As `states_of`."""
    return store.execute(states_of(store.keys, run_ids))


async def aread_states(store: AsyncStore, run_ids: Sequence[str]) -> dict[str, RunState | None]:
    """As `states_of`."""
    return await store.execute(states_of(store.keys, run_ids))


def _states(keys: Keys, run_ids: Sequence[str]) -> Callable[[Any], Any]:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for run_id in run_ids:
            pipeline.hget(keys("run", run_id), "state")
        return pipeline.execute(raise_on_error=False)

    return question


# --- sessions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session at one moment: who works in it, who waits, and all that completed runs have written.

    `holder` is a run id or None, `waiting` run ids in their order, `transcript` messages oldest first,
    `bytes` what Redis says that the session takes of its memory (`MEMORY USAGE`, sampled).
    """

    session_id: str
    holder: str | None
    waiting: tuple[str, ...]
    transcript: tuple[Mapping[str, Any], ...]
    artifacts: tuple[RunArtifact, ...]
    state: Mapping[str, Any]
    bytes: int


def read_session(store: Store, session_id: str) -> SessionView:
    """The whole session as it was at one moment, in pages. Raises `SessionNotFound`."""
    return store.execute(_session(store.keys, session_id))


async def aread_session(store: AsyncStore, session_id: str) -> SessionView:
    """The whole session as it was at one moment, in pages. Raises `SessionNotFound`."""
    return await store.execute(_session(store.keys, session_id))


def _session(keys: Keys, session_id: str) -> Plan[SessionView]:
    """What is short in one transaction, with the lengths of the rest: that grows at its end only.

    Of the queue it is the first page; who waits behind that may have moved up meanwhile.
    """

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.hgetall(keys("session", session_id))
        pipeline.hgetall(keys("session_state", session_id))
        pipeline.zrange(keys("session_queue", session_id), 0, IDS_A_PAGE - 1)
        pipeline.llen(keys("transcript", session_id))
        pipeline.llen(keys("artifacts", session_id))
        for name in SESSION_KEYS:
            pipeline.memory_usage(keys(name, session_id))
        return pipeline.execute()

    replies = yield question
    if not any(replies):
        raise SessionNotFound(
            f"no session {session_id!r} is known here",
            hint="a session begins with its first run and goes OPENAGENTS_SESSION_TTL_S after its last",
            session_id=session_id,
        )
    record, state, waiting, messages, left, *sizes = replies
    if len(waiting) == IDS_A_PAGE:
        waiting += yield from ids_of(keys("session_queue", session_id), begin=IDS_A_PAGE)
    transcript = yield from _items(keys("transcript", session_id), messages)
    artifacts = yield from _items(keys("artifacts", session_id), left)
    with reading(stored_format(record.get("format")), session_id=session_id):
        return SessionView(
            session_id,
            record.get("holder"),
            tuple(dict.fromkeys(waiting)),
            tuple(map(loads, transcript)),
            tuple(map(RunArtifact.model_validate_json, artifacts)),
            {name: loads(value) for name, value in state.items()},
            sum(size or 0 for size in sizes),
        )


def ids_of(key: str, *, begin: int = 0) -> Plan[list[str]]:
    """The members of a sorted set from this rank on, in pages."""
    found: list[str] = []
    while True:
        at = begin + len(found)
        page = yield lambda r, at=at: r.zrange(key, at, at + IDS_A_PAGE - 1)
        found += page
        if len(page) < IDS_A_PAGE:
            return found


def _items(key: str, count: int) -> Plan[list[str]]:
    """The first so many items of a list, in pages; fewer where it was deleted meanwhile."""
    items: list[str] = []
    size = PageSize(first=FIRST_PAGE, most=PAGE)
    while len(items) < count:
        at, to = len(items), min(len(items) + size.count, count)
        page = yield lambda r, at=at, to=to: r.lrange(key, at, to - 1)
        if not page:
            break
        size.learn(len(page), sum(map(len, page)))
        items += page
    return items


class SessionStore:
    """A session as the runtime reads it. Runs write to it only by finishing, so it grows only at its end.

    `upto` is a length noted earlier (that of step 0): with it a replay reads the very same prefix. `last`
    asks for that many of the newest; everything comes oldest first.
    """

    def __init__(self, store: Reader) -> None:
        self._store = store

    async def load_messages(
        self, session_id: str, *, last: int | None = None, upto: int | None = None
    ) -> list[dict[str, Any]]:
        texts = [text async for text in self._items("transcript", session_id, last, upto)]
        with reading(WRITTEN, session_id=session_id):
            return list(map(loads, texts))

    async def list_artifacts(
        self, session_id: str, *, last: int | None = None, upto: int | None = None
    ) -> list[RunArtifact]:
        texts = [text async for text in self._items("artifacts", session_id, last, upto)]
        with reading(WRITTEN, session_id=session_id):
            return list(map(RunArtifact.model_validate_json, texts))

    async def count_messages(self, session_id: str) -> int:
        return await self._length("transcript", session_id)

    async def count_artifacts(self, session_id: str) -> int:
        return await self._length("artifacts", session_id)

    async def load_state_texts(self, session_id: str) -> dict[str, str]:
        """The session's state by top-level key, each value as the JSON that is stored."""
        key = self._store.keys("session_state", session_id)
        texts: dict[str, str] = await self._store.ask(lambda r: r.hgetall(key))
        return texts

    async def _length(self, kind: str, session_id: str) -> int:
        key = self._store.keys(kind, session_id)
        return int(await self._store.ask(lambda r: r.llen(key)))

    async def _items(
        self, kind: str, session_id: str, last: int | None, upto: int | None
    ) -> AsyncIterator[str]:
        """The wanted items in pages. What a later run appends meanwhile is not among them."""
        end = await self._length(kind, session_id) if upto is None else upto
        at = 0 if last is None else max(0, end - last)
        key, size = self._store.keys(kind, session_id), PageSize(first=FIRST_PAGE, most=PAGE)
        while at < end:
            to = min(at + size.count, end)
            page = await self._page(key, at, to)
            size.learn(len(page), sum(map(len, page)))
            for item in page:
                yield item
            at = to

    async def _page(self, key: str, at: int, to: int) -> list[str]:
        return list(await self._store.ask(lambda r: r.lrange(key, at, to - 1)))
