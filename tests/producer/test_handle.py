"""Handles: a run seen as a Celery result, read from its record and its events."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import AsyncGenerator, Callable
from datetime import date
from typing import Any

import celery.exceptions
import celery.result
import pytest
from celery.result import allow_join_result, denied_join_result
from pydantic import BaseModel, ConfigDict, field_validator

from openagents_worker.errors import (
    LLMResponseError,
    OutputValidationError,
    RecordUnreadable,
    RequestInvalid,
    RunFailed,
    RunNotFound,
    SessionNotFound,
)
from openagents_worker.models import RunRequest, RunResult, RunState, StopReason
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.handle import CELERY_STATES, AsyncRunHandle, RunHandle, WaitTimeout
from openagents_worker.settings import Settings
from openagents_worker.store.scripts import CancelAnswer
from tests.support.scripts import Hand
from tests.support.waiting import PATIENCE_S, await_for, wait_for

FIELDS = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi", "run_id": "r1"}


@pytest.fixture
def handle(client: Client, hand: Hand) -> RunHandle[Any]:
    return client.submit(FIELDS)


@pytest.fixture
async def aclient(settings: Settings) -> AsyncGenerator[AsyncClient]:
    async with AsyncClient(settings=settings) as client:
        yield client


def in_a_thread(action: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Starts it; the list gets its one outcome, value or error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(action())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def is_listening(hand: Hand) -> bool:
    return bool(hand.store.redis.pubsub_channels("oa:events:*"))


def test_a_finished_run_gives_its_result(handle: RunHandle[Any], hand: Hand) -> None:
    """`get` gives JSON, `wait` a `RunResult`; Celery's properties agree."""
    hand.claim("r1")
    hand.finish("r1", "391")

    assert handle.get(timeout=PATIENCE_S)["final_output"] == "391"
    assert handle.wait(timeout=PATIENCE_S) == RunResult(
        run_id="r1", final_output="391", stop_reason=StopReason.COMPLETED
    )
    assert handle.result == handle.info == handle.get()
    assert (handle.state, handle.status, handle.traceback) == ("SUCCESS", "SUCCESS", None)
    assert (handle.ready(), handle.successful(), handle.failed()) == (True, True, False)


def test_waiting_listens_to_the_runs_events(handle: RunHandle[Any], hand: Hand) -> None:
    """A wait is over as soon as the run is, and asks Redis for nothing meanwhile."""
    hand.claim("r1")
    thread, outcome = in_a_thread(lambda: handle.wait(timeout=PATIENCE_S))
    wait_for(lambda: is_listening(hand), "the waiter listens")

    hand.finish("r1", "391")
    thread.join(5)

    assert outcome[0].final_output == "391"


@pytest.mark.defect("B02")
def test_a_run_that_fails_raises_its_own_code(handle: RunHandle[Any], hand: Hand) -> None:
    """`get` raises `RunFailed`; `wait` gives its result; without propagate the error is a value."""
    hand.claim("r1")
    hand.finish("r1", error=LLMResponseError("no choices", hint="look at the model"))

    with pytest.raises(RunFailed) as raised:
        handle.get(timeout=PATIENCE_S)

    error = raised.value
    assert (error.code, error.message, error.run_id) == ("llm.response", "no choices", "r1")
    assert error.result is not None
    assert error.result["stop_reason"] == "failed"
    assert handle.wait().stop_reason is StopReason.FAILED
    assert isinstance(handle.get(propagate=False), RunFailed)
    assert isinstance(handle.result, RunFailed)
    assert (handle.state, handle.failed(), handle.successful()) == ("FAILURE", True, False)
    assert pickle.loads(pickle.dumps(error)).code == "llm.response"  # noqa: S301  # it was just made here


def test_a_wait_that_is_too_short_raises_and_the_run_goes_on(handle: RunHandle[Any]) -> None:
    """Both Celery's and Python's TimeoutError; waiting again is fine."""
    for kind in (celery.exceptions.TimeoutError, TimeoutError):
        with pytest.raises(kind, match="r1"):
            handle.wait(timeout=0.05)

    assert handle.record().state is RunState.QUEUED


def test_a_queued_run_is_cancelled_at_once(handle: RunHandle[Any]) -> None:
    """No worker executes it, so it ends at once: Celery shows REVOKED, and `get` raises `run.cancelled`."""
    assert handle.cancel("changed my mind") is CancelAnswer.CANCELLED
    assert handle.cancel() is CancelAnswer.ALREADY

    assert handle.state == "REVOKED"
    with pytest.raises(RunFailed, match="changed my mind") as error:
        handle.get()
    assert error.value.code == "run.cancelled"
    assert handle.wait().stop_reason is StopReason.CANCELLED


def test_cancelling_a_running_run_asks_its_worker(handle: RunHandle[Any], hand: Hand) -> None:
    """Its worker ends it; until then it is running."""
    hand.claim("r1")

    assert handle.cancel() is CancelAnswer.REQUESTED
    assert handle.record().cancel_requested
    assert handle.state == "STARTED"


def test_celerys_revoke_cancels_the_run(handle: RunHandle[Any]) -> None:
    """Its options are accepted; `forget` leaves the record alone."""
    handle.revoke(terminate=True, signal="SIGKILL")
    handle.forget()

    assert handle.record().state is RunState.CANCELLED


def test_every_run_state_has_a_celery_state() -> None:
    """No custom ones: Celery would rank them above REVOKED."""
    assert set(CELERY_STATES) == set(RunState)
    assert set(CELERY_STATES.values()) <= celery.states.ALL_STATES


def test_a_retrying_run_is_retry_to_celery(handle: RunHandle[Any], hand: Hand) -> None:
    """And not ready."""
    hand.claim("r1")
    hand.retry("r1")

    assert (handle.state, handle.ready(), handle.result) == ("RETRY", False, None)


def test_events_are_replayed_then_live(handle: RunHandle[Any], hand: Hand) -> None:
    """`for event in handle.events()` ends with the run; `after` continues after an event."""
    hand.claim("r1")
    hand.finish("r1")

    names = [event.name for event in handle.events()]

    assert names == ["run.queued", "run.attempt_started", "run.completed", "session.run.completed"]
    assert [event.seq for event in handle.events(after=3)] == [4]


def test_an_unknown_run_is_not_found_by_anything(client: Client, hand: Hand) -> None:
    """Not pending for ever, as Celery would have it: an error at once."""
    handle = client.handle("r9")

    for ask in (
        handle.get,
        handle.wait,
        handle.record,
        handle.ready,
        handle.cancel,
        lambda: handle.state,
        lambda: list(handle.events()),
    ):
        with pytest.raises(RunNotFound):
            ask()
    with pytest.raises(SessionNotFound):
        client.session("s9")


@pytest.mark.parametrize("after", [None, -1, "1"])
def test_events_after_what_is_not_a_number_are_refused(handle: RunHandle[Any], after: Any) -> None:
    """None does not mean all events, and it does not mean none."""
    handle.cancel()
    for watch in (handle.events, handle.stream):
        with pytest.raises(RequestInvalid, match="after must be a whole number"):
            next(watch(after))


@pytest.mark.parametrize("method", ["events", "aevents", "stream", "astream"])
async def test_events_for_asyncio_after_none_are_refused(
    handle: RunHandle[Any], aclient: AsyncClient, method: str
) -> None:
    """As those of the other kind of handle."""
    await aclient.handle("r1").cancel()
    handles = [aclient.handle("r1"), *([handle] if method[0] == "a" else [])]
    for each in handles:
        with pytest.raises(RequestInvalid, match="after must be a whole number"):
            await anext(getattr(each, method)(None))


@pytest.mark.parametrize("options", [{"callback": print}, {"propagate": True}])
def test_wait_refuses_options_that_only_get_has(handle: RunHandle[Any], options: dict[str, Any]) -> None:
    """It neither calls a callback nor raises the error of the run."""
    handle.cancel()
    with pytest.raises(TypeError, match=r"unexpected keyword argument '[a-z]+': get\(\) has it"):
        handle.wait(timeout=PATIENCE_S, **options)
    assert handle.wait(timeout=PATIENCE_S, propagate=False, interval=1).stop_reason is StopReason.CANCELLED


async def test_sync_waits_on_an_event_loop_say_what_to_await(handle: RunHandle[Any]) -> None:
    """They would block every other run of the process."""
    for wait in (handle.get, handle.wait, handle.events):
        with pytest.raises(RuntimeError, match="AsyncRunHandle"):
            wait()


def test_sync_waits_inside_a_celery_task_raise_as_celerys_do(handle: RunHandle[Any], hand: Hand) -> None:
    """A task that waits for a run holds a slot that the run may need; Celery's way out works here too."""
    hand.claim("r1")
    hand.finish("r1")

    with denied_join_result():
        with pytest.raises(RuntimeError, match="within a task"):
            handle.get()
        assert handle.get(disable_sync_subtasks=False)["run_id"] == "r1"
        with allow_join_result():
            assert handle.wait().ok


def test_a_group_of_runs_is_a_celery_group_result(client: Client, hand: Hand) -> None:
    """Handles are results by type, so a `ResultSet` of them works."""
    handles = [client.submit({**FIELDS, "run_id": f"r{i}", "session_id": f"s{i}"}) for i in range(3)]
    for run_id in ("r0", "r1", "r2"):
        hand.claim(run_id)
        hand.finish(run_id, run_id)

    results = celery.result.ResultSet(handles, app=client.app)

    assert results.completed_count() == 3
    assert [value["final_output"] for value in results.join()] == ["r0", "r1", "r2"]


def test_a_handle_survives_copying(handle: RunHandle[Any]) -> None:
    """A copy is the same run; pickled, a handle is its id and asks the Redis of where it lands."""
    copied = copy.copy(handle)

    assert copied == handle
    assert copied.state == "PENDING"
    assert handle.__reduce__() == (RunHandle, ("r1",))


def test_submitting_opens_no_subscription(handle: RunHandle[Any], hand: Hand) -> None:
    """A producer that never looks costs Redis nothing."""
    assert not is_listening(hand)
    assert hand.store.redis.info("clients")["pubsub_clients"] == 0


# --- asyncio ---------------------------------------------------------------------------------------------


async def test_the_async_handle_has_the_same_names(aclient: AsyncClient, hand: Hand) -> None:
    """Submit, wait, get, events, state: awaited."""
    handle = await aclient.submit(FIELDS)
    waiting = asyncio.create_task(handle.wait(timeout=PATIENCE_S), name="waiter")
    await asyncio.to_thread(hand.claim, "r1")
    await await_for(lambda: is_listening(hand), "the waiter listens")

    await asyncio.to_thread(hand.finish, "r1", "391")

    assert (await waiting).final_output == "391"
    assert (await handle.get())["final_output"] == "391"
    assert (await handle.state(), await handle.ready(), await handle.successful()) == ("SUCCESS", True, True)
    assert [event.seq async for event in handle.events(after=2)] == [3, 4]
    assert (await aclient.session("s1")).holder is None


async def test_an_async_wait_that_is_too_short_raises(aclient: AsyncClient) -> None:
    """And leaves no subscription behind."""
    handle = await aclient.submit(FIELDS)

    with pytest.raises(celery.exceptions.TimeoutError, match="r1"):
        await handle.wait(timeout=0.05)

    assert await handle.cancel() is CancelAnswer.CANCELLED
    with pytest.raises(RunFailed):
        await handle.get()
    assert not await handle.failed()


async def test_an_unknown_run_is_not_found_by_asyncio_either(aclient: AsyncClient) -> None:
    """At once."""
    handle: AsyncRunHandle[Any] = aclient.handle("r9")

    with pytest.raises(RunNotFound):
        await handle.wait()
    with pytest.raises(RunNotFound):
        await handle.revoke()
    with pytest.raises(RunNotFound):
        [event async for event in handle.events()]


async def test_a_sync_handles_events_can_be_read_on_a_loop(handle: RunHandle[Any], hand: Hand) -> None:
    """`aevents` is for a handle that was made by `delay` and is read by an async web server."""
    hand.claim("r1")
    hand.finish("r1")

    assert [event.seq async for event in handle.aevents()] == [1, 2, 3, 4]


# --- an answer of a class --------------------------------------------------------------------------------


class Sum(BaseModel):
    total: int

    @field_validator("total")
    @classmethod
    def _is_positive(cls, total: int) -> int:
        if total <= 0:
            raise ValueError("it is not positive")
        return total


def answered(hand: Hand, output: Any) -> None:
    hand.claim("r1")
    hand.finish("r1", output)


def test_who_asked_for_a_class_waits_for_an_instance_of_it(client: Client, hand: Hand) -> None:
    """The same for a dict and a `RunRequest`. A handle that is made from the id needs the class."""
    handle = client.submit({**FIELDS, "output_type": Sum})
    answered(hand, {"total": 391})

    assert handle.wait(timeout=PATIENCE_S).final_output == Sum(total=391)
    assert client.submit(RunRequest(**FIELDS, output_type=Sum)).wait(60).final_output == Sum(total=391)
    assert client.handle("r1", output_type=Sum).wait(60).final_output == Sum(total=391)
    assert client.handle("r1").wait(60).final_output == {"total": 391}
    assert handle.get(timeout=PATIENCE_S)["final_output"] == {"total": 391}


class Booking(BaseModel):
    model_config = ConfigDict(strict=True)

    day: date


def test_a_strict_class_is_made_of_what_json_has_for_it(client: Client, hand: Hand) -> None:
    """A date is a text in the answer."""
    handle = client.submit({**FIELDS, "output_type": Booking})
    answered(hand, {"day": "2026-01-31"})

    assert handle.wait(timeout=PATIENCE_S).final_output == Booking(day=date(2026, 1, 31))


async def test_who_asked_for_a_class_on_a_loop_gets_an_instance_too(aclient: AsyncClient, hand: Hand) -> None:
    handle = await aclient.submit({**FIELDS, "output_type": Sum})
    answered(hand, {"total": 391})

    assert (await handle.wait(timeout=PATIENCE_S)).final_output == Sum(total=391)
    assert (await aclient.handle("r1").wait(timeout=PATIENCE_S)).final_output == {"total": 391}


def test_an_answer_that_the_class_itself_refuses_is_an_error(client: Client, hand: Hand) -> None:
    """A schema cannot express all rules of a class. The hint explains how the worker can check the class."""
    handle = client.submit({**FIELDS, "output_type": Sum})
    answered(hand, {"total": -1})

    with pytest.raises(OutputValidationError, match="it is not positive") as refused:
        handle.wait(timeout=PATIENCE_S)
    assert "register_output" in str(refused.value.hint)


@pytest.mark.defect("B02")
def test_a_failed_run_has_no_answer_to_parse(client: Client, hand: Hand) -> None:
    """It is a result like any other."""
    handle = client.submit({**FIELDS, "output_type": Sum})
    hand.claim("r1")
    hand.finish("r1", error=LLMResponseError("no"))

    result = handle.wait(timeout=PATIENCE_S)

    assert (result.ok, result.final_output) == (False, None)


@pytest.mark.defect("X01")
def test_a_class_travels_as_its_schema_whole(client: Client, hand: Hand) -> None:
    """Also null values in it. A class without a schema is rejected at once."""

    class Maybe(BaseModel):
        total: int | None = None

    class Never(BaseModel):
        call: Callable[[], int]

    client.submit({**FIELDS, "output_type": Maybe})

    stored = client.record("r1").request
    assert stored is not None
    assert stored.output_type == Maybe.model_json_schema()
    assert stored.output_type["properties"]["total"]["default"] is None  # type: ignore[index,call-overload]  # a schema
    with pytest.raises(RequestInvalid, match="Never has no JSON Schema"):
        client.submit({**FIELDS, "run_id": "r2", "output_type": Never})
    client.cancel("r1")


def test_a_run_that_follows_another_is_awaited_before_it_is_there(client: Client, hand: Hand) -> None:
    """In a chain the next run is submitted when the one before it is over; until then it is PENDING."""
    hand.submit("first")
    first = client.handle("first")
    second = RunHandle("second", client=client, parent=first)

    assert (second.state, second.ready()) == ("PENDING", False)
    with pytest.raises(WaitTimeout):
        second.get(timeout=0.2)
    client.cancel("first")
    with pytest.raises(RunFailed) as failed:
        second.get(timeout=PATIENCE_S)
    assert failed.value.run_id == "first"


# --- records that cannot be read -------------------------------------------------------------------------


def test_whoever_waits_gets_the_end_of_a_run_that_cannot_be_read_until_then(
    client: Client, hand: Hand, handle: RunHandle[Any]
) -> None:
    """Its worker fails it for that reason. The record of the end can be read."""
    client.store.redis.hset(client.store.keys("run", "r1"), "usage", "not JSON")
    waiting, outcome = in_a_thread(lambda: handle.wait(PATIENCE_S))
    hand.claim("r1")
    hand.finish("r1")
    waiting.join()

    assert isinstance(outcome[0], RunResult), outcome
    assert outcome[0].run_id == "r1"


async def test_the_asyncio_handle_waits_for_it_too(
    client: Client, aclient: AsyncClient, hand: Hand, handle: RunHandle[Any]
) -> None:
    """As its twin does."""
    client.store.redis.hset(client.store.keys("run", "r1"), "usage", "not JSON")
    waiting = asyncio.create_task(aclient.handle("r1").wait(PATIENCE_S))
    await asyncio.to_thread(hand.claim, "r1")
    await asyncio.to_thread(hand.finish, "r1")

    assert (await waiting).run_id == "r1"


@pytest.mark.parametrize("field", ["state", "created"])
def test_a_run_that_is_over_and_cannot_be_read_is_an_error(
    client: Client, hand: Hand, handle: RunHandle[Any], field: str
) -> None:
    """With an error code, and no wait lasts forever."""
    hand.claim("r1")
    hand.finish("r1")
    redis, key = client.store.redis, client.store.keys("run", "r1")
    written = redis.hget(key, field) or ""
    redis.hset(key, field, "yesterday")

    with pytest.raises(RecordUnreadable):
        handle.wait(PATIENCE_S)
    redis.hset(key, field, written)
