"""Handles. The only place where a run looks like a Celery result: asked for by id, answered from its record.

No result backend is read and nothing is polled: a wait listens to the run's events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Generic, cast

from celery import exceptions, states
from celery.result import AsyncResult, assert_will_not_block
from pydantic import BaseModel, ValidationError

from openagents_worker.arguments import seconds_of
from openagents_worker.errors import OutputValidationError, RecordUnreadable, RunFailed, RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.models import OutputT, RunRecord, RunResult, RunState, run_failed
from openagents_worker.producer.chain import may_be_submitted, raise_failure_before
from openagents_worker.store.records import aread_states, is_notify_pending, read_states
from openagents_worker.store.scripts import CancelAnswer
from openagents_worker.store.watch import awatch, watch

if TYPE_CHECKING:
    from openagents_worker.producer.client import AsyncClient, Client

PREDECESSOR_PAUSE_S = 0.1

__all__ = ["CELERY_STATES", "AsyncRunHandle", "RunHandle", "WaitTimeout"]

CELERY_STATES: Mapping[RunState, str] = {
    RunState.SCHEDULED: states.PENDING,
    RunState.QUEUED: states.PENDING,
    RunState.WAITING_SESSION: states.PENDING,
    RunState.RUNNING: states.STARTED,
    RunState.RETRYING: states.RETRY,
    RunState.COMPLETED: states.SUCCESS,
    RunState.FAILED: states.FAILURE,
    RunState.CANCELLED: states.REVOKED,
}


class WaitTimeout(exceptions.TimeoutError, TimeoutError):  # type: ignore[misc]  # Celery ships no types
    """The run was not over in time; it goes on. Both Celery's and Python's `TimeoutError`."""


class RunHandle(AsyncResult, Generic[OutputT]):  # type: ignore[misc]  # Celery ships no types
    """A producer's view of one run, and a Celery `AsyncResult` by type.

    Whatever looks at the run raises `RunNotFound` when its id is not known (any more) and `RedisUnreachable`
    when Redis is away. Whatever waits raises RuntimeError inside an event loop or a Celery task. In a chain a
    run is submitted when what stands before it is over: until then its handle is PENDING and not ready, and
    waiting includes what stands before it.
    """

    id: str

    def __init__(
        self,
        id: str,
        backend: Any = None,
        task_name: str | None = None,
        app: Any = None,
        parent: Any = None,
        *,
        client: Client | None = None,
        output_type: type[BaseModel] | None = None,
    ) -> None:
        self._output_type = output_type
        self._client = client or _client_for(app)
        super().__init__(id, self._client.no_backend, task_name, self._client.app, parent)

    def __reduce__(self) -> tuple[Any, ...]:
        # Where it lands, it asks the Redis of that environment; of a chain it keeps what stands before it.
        if self.parent is None:
            return type(self), (self.id,)
        return type(self), (self.id, None, None, None, self.parent)

    # --- what a run adds ---------------------------------------------------------------------------------

    def record(self) -> RunRecord:
        """The run as it stands now."""
        return self._client.record(self.id)

    def wait(self, timeout: float | None = None, **celery_options: Any) -> RunResult[OutputT]:
        """Wait until the run is over; a run that failed is a result too. `timeout` in seconds.

        The result of a run that did not complete has `final_output` None; its `output` raises `RunFailed`, as
        `get()` does. Celery's other parameters are accepted; nothing is polled, so none of them is needed.
        Raises `WaitTimeout`; and `OutputValidationError` when the request asked for a pydantic class that
        refuses the answer, though it fits its schema.
        """
        return cast("RunResult[OutputT]", _parsed(self._ended(timeout, **celery_options), self._output_type))

    def events(self, after: int = 0) -> Generator[RunEvent]:
        """The run's events after number `after`, then live, until the run is over.

        Raises `TooManyWatchers` with the first of them where `OPENAGENTS_MAX_WATCHERS` are followed already.
        """
        _must_not_block("events()")
        return watch(self._client.store, self.id, after)

    async def aevents(self, after: int = 0) -> AsyncGenerator[RunEvent]:
        """As `events`, for asyncio. All that are read on one event loop share one pub/sub connection."""
        client = await self._client.on_this_loop()
        async with aclosing(awatch(client.store, self.id, after)) as events:
            async for event in events:
                yield event

    def cancel(self, reason: str | None = None) -> CancelAnswer:
        """Cancel the run: CANCELLED at once, REQUESTED of its worker, or ALREADY over."""
        return self._client.cancel(self.id, reason)

    # --- what Celery's results have ----------------------------------------------------------------------

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        *,
        callback: Callable[[str, Any], None] | None = None,
        **celery_options: Any,
    ) -> Any:
        """Wait until the run is over: its result as a JSON dict.

        Raises `WaitTimeout`, and `RunFailed` with the run's own code for a run that did not complete;
        without `propagate` that error is returned.
        """
        value = _outcome(self._ended(timeout, **celery_options))
        if isinstance(value, RunFailed) and propagate:
            raise value
        if callback is not None:
            callback(self.id, value)
        return value

    @property
    def state(self) -> str:
        """Celery's word for the run's state; PENDING for the next one of a chain until it is submitted."""
        record = self._record_in_chain()
        return states.PENDING if record is None else CELERY_STATES[record.state]

    status = state

    @property
    def result(self) -> Any:
        """What `get` would give or raise; None while the run is not over."""
        record = self._record_in_chain()
        return _outcome(record) if record is not None and record.state.is_terminal else None

    info = result

    @property
    def traceback(self) -> str | None:
        """Where your code failed, as the worker saw it: redacted and bounded. None while the run is not over,
        and where the error's code says it all."""
        return _traceback(self.record())

    def ready(self) -> bool:
        record = self._record_in_chain()
        return record is not None and record.state.is_terminal

    def successful(self) -> bool:
        record = self._record_in_chain()
        return record is not None and record.state is RunState.COMPLETED

    def failed(self) -> bool:
        record = self._record_in_chain()
        return record is not None and record.state is RunState.FAILED

    def _may_call_next(self) -> bool:
        """Whether what follows the run may still be called; True also where it never is: it did not complete.

        Raises `RunNotFound`.
        """
        record = self._record_in_chain()
        if record is None or record.state is not RunState.COMPLETED:
            return True
        return is_notify_pending(self._client.store, self.id)

    def revoke(self, *_: Any, **__: Any) -> None:
        """Cancel the run; Celery's options mean nothing here."""
        self.cancel("revoked")

    def forget(self) -> None:
        """Nothing: the record goes by itself when its time is over."""

    def _get_task_meta(self) -> dict[str, Any]:
        """Whatever else Celery offers on a result reads this."""
        record = self._record_in_chain()
        if record is None:
            return {"status": states.PENDING, "result": None, "traceback": None, "children": []}
        return {
            "status": CELERY_STATES[record.state],
            "result": _outcome(record) if record.state.is_terminal else None,
            "traceback": _traceback(record),
            "children": [],
            "retries": record.retries,
            "worker": record.worker,
            "queue": record.queue,
        }

    def _ended(
        self, timeout: float | None, *, disable_sync_subtasks: bool = True, **_ignored: Any
    ) -> RunRecord:
        _must_not_block("wait() and get()", also_in_tasks=disable_sync_subtasks)
        timeout = seconds_of("timeout", timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wait_for_predecessor(timeout, deadline)
        while (record := self._record_if_over()) is None:
            try:
                watched = watch(self._client.store, self.id, None, deadline=deadline, is_wait=True)
                with closing(watched) as events:
                    for _ in events:
                        pass
            except TimeoutError:
                raise _late(self.id, timeout) from None
        return record

    def _record_if_over(self) -> RunRecord | None:
        """The record of a run that is over. What cannot be read of one that is not ends it: that is waited
        for."""
        try:
            record = self.record()
        except RecordUnreadable:
            state = read_states(self._client.store, [self.id])[self.id]
            if state is None or not state.is_terminal:
                return None
            record = self.record()  # it may have ended between the two
        return record if record.state.is_terminal else None

    def _record_in_chain(self) -> RunRecord | None:
        """None: what stands before it in its chain is not over, and nobody has submitted this run yet."""
        try:
            return self.record()
        except RunNotFound:
            if self.parent is None:
                raise
        if may_be_submitted(self.parent):
            return None
        return self.record()  # it may have been submitted since; else it never was, or is gone

    def _wait_for_predecessor(self, timeout: float | None, deadline: float | None) -> None:
        """In a chain a run begins to be when what stands before it is over. Raises what failed before it."""
        while self.parent is not None and self._record_in_chain() is None:
            raise_failure_before(self)
            if deadline is not None and time.monotonic() > deadline:
                raise _late(self.id, timeout)
            time.sleep(PREDECESSOR_PAUSE_S)


class AsyncRunHandle(Generic[OutputT]):
    """A producer's view of one run, for asyncio. The same names as `RunHandle`; what asks is awaited."""

    def __init__(self, id: str, *, client: AsyncClient, output_type: type[BaseModel] | None = None) -> None:
        self.id = id
        self._output_type = output_type
        self._client = client

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    async def record(self) -> RunRecord:
        """The run as it stands now."""
        return await self._client.record(self.id)

    async def wait(self, timeout: float | None = None) -> RunResult[OutputT]:
        """Wait until the run is over, as `RunHandle.wait` does: `output` of the result raises `RunFailed`.

        `timeout` in seconds.
        """
        return cast("RunResult[OutputT]", _parsed(await self._ended(timeout), self._output_type))

    async def get(self, timeout: float | None = None, propagate: bool = True) -> Any:
        """Wait until the run is over: its result as a JSON dict. Raises `WaitTimeout` or `RunFailed`."""
        value = _outcome(await self._ended(timeout))
        if isinstance(value, RunFailed) and propagate:
            raise value
        return value

    def events(self, after: int = 0) -> AsyncGenerator[RunEvent]:
        """The run's events after number `after`, then live, until the run is over.

        Raises `TooManyWatchers` with the first of them where `OPENAGENTS_MAX_WATCHERS` are followed already.
        """
        return awatch(self._client.store, self.id, after)

    def aevents(self, after: int = 0) -> AsyncGenerator[RunEvent]:
        """`events`, by the name that both kinds of handle have."""
        return self.events(after)

    async def cancel(self, reason: str | None = None) -> CancelAnswer:
        """Cancel the run: CANCELLED at once, REQUESTED of its worker, or ALREADY over."""
        return await self._client.cancel(self.id, reason)

    async def revoke(self) -> None:
        """Cancel the run."""
        await self.cancel("revoked")

    async def state(self) -> str:
        """Celery's word for the run's state."""
        return CELERY_STATES[(await self.record()).state]

    async def ready(self) -> bool:
        return (await self.record()).state.is_terminal

    async def successful(self) -> bool:
        return (await self.record()).state is RunState.COMPLETED

    async def failed(self) -> bool:
        return (await self.record()).state is RunState.FAILED

    async def _record_if_over(self) -> RunRecord | None:
        try:
            record = await self.record()
        except RecordUnreadable:
            state = (await aread_states(self._client.store, [self.id]))[self.id]
            if state is None or not state.is_terminal:
                return None
            record = await self.record()
        return record if record.state.is_terminal else None

    async def _ended(self, timeout: float | None) -> RunRecord:
        try:
            async with asyncio.timeout(seconds_of("timeout", timeout)):
                while (record := await self._record_if_over()) is None:
                    watched = awatch(self._client.store, self.id, None, is_wait=True)
                    async with aclosing(watched) as events:
                        async for _ in events:
                            pass
                return record
        except TimeoutError:
            raise _late(self.id, timeout) from None


def _parsed(record: RunRecord, wanted: type[BaseModel] | None) -> RunResult[Any]:
    """The result of a run that is over, its answer as an instance of the class that was asked for."""
    assert record.result is not None, "a run that is over has a result"
    if wanted is None or not record.result.ok:
        return record.result
    try:
        answer = wanted.model_validate(record.result.final_output)
    except ValidationError as error:
        raise OutputValidationError(
            f"the run's answer fits the schema of {wanted.__name__}, and it refuses it: {error}",
            hint="register_output lets the worker ask the class itself, and the model again",
            output_type=wanted.__name__,
            run_id=record.run_id,
        ) from error
    return record.result.model_copy(update={"final_output": answer})


def _outcome(record: RunRecord) -> dict[str, Any] | RunFailed:
    """A run that is over, as `get` gives or raises it."""
    assert record.result is not None, "a run that is over has a result"
    if record.state is RunState.COMPLETED:
        return record.result.model_dump(mode="json")
    return run_failed(record.result, agent_id=record.agent_id, session_id=record.session_id)


def _must_not_block(what: str, *, also_in_tasks: bool = True) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if also_in_tasks:
            assert_will_not_block()
        return
    raise RuntimeError(
        f"{what} would block this event loop; await the same name of an AsyncRunHandle, which "
        "AsyncClient.handle(run_id) and run_agent.adelay(request) give"
    )


def _late(run_id: str, timeout: float | None) -> WaitTimeout:
    return WaitTimeout(f"the run {run_id!r} was not over within {timeout} s; it goes on, and so may waiting")


def _client_for(app: Any) -> Client:
    from openagents_worker.producer.client import client_of, default_client  # clients make handles

    return default_client() if app is None else client_of(app)


def _traceback(record: RunRecord) -> str | None:
    details = None if record.result is None else record.result.error_details
    return None if details is None else details.traceback
