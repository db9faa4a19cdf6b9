"""Handles. The only place that shows a run as a Celery result, which is read from the record of the run.

No result backend is used and nothing is polled: a wait listens to the events of the run.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from typing import Any, Generic, cast

from celery import states
from celery.result import AsyncResult, assert_will_not_block
from pydantic import BaseModel
from typing_extensions import Unpack

from openagents_worker.arguments import check_keywords, number_of, seconds_of
from openagents_worker.errors import RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.models import OutputT, RunRecord, RunResult, RunState, RunStreamChunk
from openagents_worker.producer import plans, run_results
from openagents_worker.producer.chain import RunResultInChain, may_be_submitted, raise_failure_before
from openagents_worker.producer.chunks import achunks_of, chunks_of
from openagents_worker.producer.connection import (
    Connection,
    connection_of,
    default_connection,
)
from openagents_worker.producer.decisions import AsyncRunDecisions, RunDecisions
from openagents_worker.producer.methods import (
    HasAsyncConnection,
    HasConnection,
    asynchronous_of_run,
    blocking_of_run,
)
from openagents_worker.producer.run_messages import AsyncRunMessages, RunMessages
from openagents_worker.producer.run_results import (
    CELERY_STATES,
    WaitTimeout,
    parsed_result,
    result_of_get,
    result_or_error,
    timeout_of_wait,
    traceback_of,
)
from openagents_worker.store.records import is_notify_pending
from openagents_worker.store.watch import await_end, awatch, wait_for_end, watch
from openagents_worker.submission.submit import ForkOptions

PREDECESSOR_PAUSE_S = 0.1
WAIT_OPTIONS = frozenset(inspect.signature(AsyncResult.get).parameters) - {"self"}
"""The parameters of Celery's `get`. All but four do nothing here, because nothing is polled."""

__all__ = ["CELERY_STATES", "AsyncRunHandle", "RunHandle", "WaitTimeout"]


class RunHandle(RunDecisions, RunMessages, RunResultInChain, Generic[OutputT]):
    """A producer's view of one run. It is a Celery `AsyncResult`.

    Methods that read the run raise `RunNotFound` for an unknown or expired id, and `RedisUnreachable` if
    Redis cannot be reached. Methods that wait raise RuntimeError inside an event loop or a Celery task. In a
    chain, a run is submitted when the previous task or run has ended. Until then its handle is PENDING and
    not ready, and waiting includes the previous ones.
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
        client: HasConnection | None = None,
        output_type: type[BaseModel] | None = None,
    ) -> None:
        self._output_type = output_type
        self.connection = _connection_for(app) if client is None else client.connection
        super().__init__(id, self.connection.no_backend, task_name, self.connection.publishing.app, parent)

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process it uses the Redis of that environment. In a chain it keeps its parents.
        if self.parent is None:
            return type(self), (self.id,)
        return type(self), (self.id, None, None, None, self.parent)

    # --- runs --------------------------------------------------------------------------------------------

    record = blocking_of_run(plans.record)
    cancel = blocking_of_run(plans.cancel)

    def wait(self, timeout: float | None = None, **celery_options: Any) -> RunResult[OutputT]:
        """Wait until the run has ended, and return its result, also for a failed run. `timeout` is in
        seconds.

        For a run that did not complete, `final_output` is None, and `output` raises `RunFailed`, as `get()`
        does. Celery's other parameters are accepted and ignored, because nothing is polled; `callback` and
        `propagate=True` are a TypeError, because only `get` has them. Raises `WaitTimeout`, and
        `OutputValidationError` if the answer matches the schema of the requested pydantic class, but the
        class rejects it.
        """
        for name in ("callback", "propagate"):
            if celery_options.pop(name, None):
                raise TypeError(f"wait() got an unexpected keyword argument {name!r}: get() has it")
        return cast(
            "RunResult[OutputT]",
            parsed_result(self._wait_for_end(timeout, **celery_options), self._output_type),
        )

    def events(self, after: int = 0) -> Generator[RunEvent]:
        """The stored events of the run after number `after`, then live events, until the run has ended.

        The first event raises `TooManyWatchers` if this process already has `OPENAGENTS_MAX_WATCHERS`
        watchers. Raises `RequestInvalid` if `after` is not a number of an event.
        """
        _check_may_block("events()")
        return watch(self.connection.store, self.id, number_of("after", after))

    async def aevents(self, after: int = 0) -> AsyncGenerator[RunEvent]:
        """`events` for asyncio. All watchers of one event loop share one pub/sub connection."""
        store = self.connection.for_asyncio.store
        async with aclosing(awatch(store, self.id, number_of("after", after))) as events:
            async for event in events:
                yield event

    def stream(self, after: int = 0) -> Generator[RunStreamChunk]:
        """The events of the run in the form of the original SDK's `run_stream`, until the run has ended.

        The last chunk is `run.finished`, with the result. Before it, there is a chunk for each artifact.
        Closing the generator does not cancel the run. Raises what `events` raises.
        """
        return chunks_of(self.connection.store, self.id, after, self.events(after), self.wait)

    def astream(self, after: int = 0) -> AsyncGenerator[RunStreamChunk]:
        """`stream` for asyncio."""
        store, after = self.connection.for_asyncio.store, number_of("after", after)
        return achunks_of(store, self.id, after, self.aevents(after), self._await_result)

    async def _await_result(self) -> RunResult[OutputT]:
        record = await await_end(self.connection.for_asyncio.store, self.id)
        return cast("RunResult[OutputT]", parsed_result(record, self._output_type))

    def resume(self, *, by: str | None = None) -> None:
        """Continue the failed or cancelled run from its last checkpoint, as `Client.resume`."""
        self._resume(by)

    def fork(self, checkpoint_id: str, **options: Unpack[ForkOptions]) -> RunHandle[Any]:
        """A new run that continues from a checkpoint of this run, as `Client.fork`."""
        return RunHandle(self._fork(checkpoint_id, **options), client=self)

    _resume = blocking_of_run(plans.resume)
    _fork = blocking_of_run(plans.fork)

    # --- Celery results ----------------------------------------------------------------------------------

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        *,
        callback: Callable[[str, Any], None] | None = None,
        **celery_options: Any,
    ) -> Any:
        """Wait until the run has ended, and return its result as a JSON dict.

        Raises `WaitTimeout`, and `RunFailed` with the error code of the run for a run that did not complete.
        With `propagate=False` the `RunFailed` is returned.
        """
        value = result_of_get(self._wait_for_end(timeout, **celery_options), propagate)
        if callback is not None:
            callback(self.id, value)
        return value

    @property
    def state(self) -> str:
        """Celery's name of the state of the run. A run of a chain is PENDING until it is submitted."""
        record = self._record_in_chain()
        return states.PENDING if record is None else CELERY_STATES[record.state]

    status = state

    @property
    def result(self) -> Any:
        """The value that `get` returns or raises; None until the run has ended."""
        record = self._record_in_chain()
        return result_or_error(record) if record is not None and record.state.is_terminal else None

    info = result

    @property
    def traceback(self) -> str | None:
        """The traceback of your code in the worker: redacted text of limited length.

        None until the run has ended, and for an error that was not raised by your code.
        """
        return traceback_of(self.record())

    def ready(self) -> bool:
        record = self._record_in_chain()
        return record is not None and record.state.is_terminal

    def successful(self) -> bool:
        record = self._record_in_chain()
        return record is not None and record.state is RunState.COMPLETED

    def failed(self) -> bool:
        record = self._record_in_chain()
        return record is not None and record.state is RunState.FAILED

    def may_call_next(self) -> bool:
        record = self._record_in_chain()
        if record is None or record.state is not RunState.COMPLETED:
            return True
        return is_notify_pending(self.connection.store, self.id)

    def revoke(self, *_: Any, **__: Any) -> None:
        """Cancel the run. Celery's options are ignored."""
        self.cancel("revoked")

    def forget(self) -> None:
        """Does nothing: the record expires."""

    def _get_task_meta(self) -> dict[str, Any]:
        """The data for Celery's other methods of a result."""
        record = self._record_in_chain()
        if record is None:
            return {"status": states.PENDING, "result": None, "traceback": None, "children": []}
        return {
            "status": CELERY_STATES[record.state],
            "result": result_or_error(record) if record.state.is_terminal else None,
            "traceback": traceback_of(record),
            "children": [],
            "retries": record.retries,
            "worker": record.worker,
            "queue": record.queue,
        }

    def _wait_for_end(
        self, timeout: float | None, *, disable_sync_subtasks: bool = True, **ignored: Any
    ) -> RunRecord:
        check_keywords("wait() or get() of a run", ignored, WAIT_OPTIONS)
        _check_may_block("wait() and get()", also_in_tasks=disable_sync_subtasks)
        timeout = seconds_of("timeout", timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        with timeout_of_wait(self.id, timeout):
            self._wait_for_predecessor(deadline)
            return wait_for_end(self.connection.store, self.id, deadline)

    def _record_in_chain(self) -> RunRecord | None:
        """The record; None if the run is part of a chain and may still be submitted."""
        try:
            return self.record()
        except RunNotFound:
            if self.parent is None:
                raise
        if may_be_submitted(self.parent):
            return None
        return self.record()  # it was submitted meanwhile; otherwise this raises `RunNotFound`

    def _wait_for_predecessor(self, deadline: float | None) -> None:
        """In a chain, wait until the run is submitted. Raises the failure of a previous task or run.

        Raises `TimeoutError` after `deadline`, a time of `time.monotonic()`.
        """
        while self.parent is not None and self._record_in_chain() is None:
            raise_failure_before(self)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(PREDECESSOR_PAUSE_S)


class AsyncRunHandle(AsyncRunDecisions, AsyncRunMessages, Generic[OutputT]):
    """A producer's view of one run for asyncio, with the methods of `RunHandle`."""

    def __init__(
        self, id: str, *, client: HasAsyncConnection, output_type: type[BaseModel] | None = None
    ) -> None:
        self.id = id
        self._output_type = output_type
        self.connection = client.connection

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    record = asynchronous_of_run(plans.record)
    cancel = asynchronous_of_run(plans.cancel)
    revoke = asynchronous_of_run(plans.revoke)
    state = asynchronous_of_run(run_results.state)
    ready = asynchronous_of_run(run_results.ready)
    successful = asynchronous_of_run(run_results.successful)
    failed = asynchronous_of_run(run_results.failed)

    async def wait(self, timeout: float | None = None) -> RunResult[OutputT]:
        """Wait until the run has ended, as `RunHandle.wait` does. `timeout` is in seconds."""
        return cast("RunResult[OutputT]", parsed_result(await self._wait_for_end(timeout), self._output_type))

    async def get(self, timeout: float | None = None, propagate: bool = True) -> Any:
        """Wait until the run has ended, and return its result as `RunHandle.get` does."""
        return result_of_get(await self._wait_for_end(timeout), propagate)

    def events(self, after: int = 0) -> AsyncGenerator[RunEvent]:
        """The stored events of the run after number `after`, then live events, until the run has ended.

        The first event raises `TooManyWatchers` if this process already has `OPENAGENTS_MAX_WATCHERS`
        watchers. Raises `RequestInvalid` if `after` is not a number of an event.
        """
        return awatch(self.connection.store, self.id, number_of("after", after))

    def aevents(self, after: int = 0) -> AsyncGenerator[RunEvent]:
        """The same as `events`, so that both kinds of handle have this name."""
        return self.events(after)

    def stream(self, after: int = 0) -> AsyncGenerator[RunStreamChunk]:
        """The events of the run in the form of the original SDK, as `RunHandle.stream`."""
        return achunks_of(self.connection.store, self.id, after, self.events(after), self.wait)

    def astream(self, after: int = 0) -> AsyncGenerator[RunStreamChunk]:
        """The same as `stream`, so that both kinds of handle have this name."""
        return self.stream(after)

    async def resume(self, *, by: str | None = None) -> None:
        """The same as `RunHandle.resume`."""
        await self._resume(by)

    async def fork(self, checkpoint_id: str, **options: Unpack[ForkOptions]) -> AsyncRunHandle[Any]:
        """A new run that continues from a checkpoint of this run, as `Client.fork`."""
        return AsyncRunHandle(await self._fork(checkpoint_id, **options), client=self)

    _resume = asynchronous_of_run(plans.resume)
    _fork = asynchronous_of_run(plans.fork)

    async def _wait_for_end(self, timeout: float | None) -> RunRecord:
        with timeout_of_wait(self.id, timeout):
            async with asyncio.timeout(seconds_of("timeout", timeout)):
                return await await_end(self.connection.store, self.id)


def _check_may_block(what: str, *, also_in_tasks: bool = True) -> None:
    """Raises RuntimeError inside an event loop and, with `also_in_tasks`, inside a Celery task."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if also_in_tasks:
            assert_will_not_block()
        return
    raise RuntimeError(
        f"{what} would block this event loop; await the same method of an AsyncRunHandle, from "
        "AsyncClient.handle(run_id) or run_agent.adelay(request)"
    )


def _connection_for(app: Any) -> Connection:
    return default_connection() if app is None else connection_of(app)
