"""`run_agent`: a Celery task whose submission is a run's acceptance."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import celery
import pytest
from celery.beat import Scheduler

from openagents_worker.errors import ConfigError, RequestInvalid, TwoArguments
from openagents_worker.models import RunRequest, RunState
from openagents_worker.producer.client import Client, client_of
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.publisher import make_app
from openagents_worker.producer.task import AgentTask, ProducerTask
from openagents_worker.settings import Settings, load_settings

FIELDS = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi"}


@pytest.fixture
def run_agent(client: Client) -> AgentTask:
    task: AgentTask = client.app.register_task(ProducerTask())
    return task


def test_a_task_stays_with_its_app(redis_url: str, client: Client) -> None:
    """Celery notes the app of a task in its class: the task of a second app leaves the first one's alone."""
    first: AgentTask = client.app.register_task(ProducerTask())
    with Client(
        settings=load_settings({"OPENAGENTS_REDIS_URL": f"{redis_url.rpartition('/')[0]}/1"})
    ) as other:
        second: AgentTask = other.app.register_task(ProducerTask())
        here, there = first.delay(FIELDS), second.delay(FIELDS)

        assert (first.app, second.app) == (client.app, other.app)
        assert [run.run_id for run in client.runs()] == [here.id]
        assert [run.run_id for run in other.runs()] == [there.id]
        for one in (client, other):
            assert one.store.redis.llen("agents") == 1
            one.store.redis.flushdb()


def is_empty(client: Client) -> bool:
    return client.store.redis.dbsize() == 0


def test_delay_takes_a_request_or_its_fields_and_gives_a_handle(run_agent: AgentTask) -> None:
    """`run_agent.delay(request)` is all that a producer needs; the handle's id is the run's."""
    one = run_agent.delay(RunRequest(**FIELDS, run_id="r1"))
    two = run_agent.delay(FIELDS)
    three = run_agent.apply_async(kwargs={"request": FIELDS})

    assert (one.id, one.task_id) == ("r1", "r1")
    assert isinstance(one, celery.result.AsyncResult)
    assert len({one.id, two.id, three.id}) == 3
    for handle in (one, two, three):
        assert handle.status == "PENDING"
        handle.cancel()


async def test_adelay_gives_an_async_handle(run_agent: AgentTask) -> None:
    """The same for asyncio, with Celery's options where they are wanted."""
    handle = await run_agent.adelay(FIELDS, task_id="r1", countdown=60)

    assert isinstance(handle, AsyncRunHandle)
    assert handle.id == "r1"
    assert (await handle.record()).state is RunState.SCHEDULED
    await handle.cancel()


def test_a_loop_that_ends_closes_what_adelay_opened(run_agent: AgentTask, client: Client) -> None:
    """Many short loops in one process leave no connection behind."""

    async def submit_and_cancel() -> None:
        handle = await run_agent.adelay(FIELDS)
        await handle.cancel()

    asyncio.run(submit_and_cancel())
    before = len(client.store.redis.client_list())
    for _ in range(3):
        asyncio.run(submit_and_cancel())

    assert len(client.store.redis.client_list()) <= before


def test_a_second_argument_is_refused(run_agent: AgentTask, client: Client) -> None:
    """A chain that passes a value to a signature with a request would execute the wrong request."""
    with pytest.raises(TwoArguments, match="2 were given") as error:
        run_agent.apply_async(args=["value before", FIELDS])
    with pytest.raises(TwoArguments):
        run_agent.delay("value before", FIELDS)

    assert ".si(request)" in str(error.value)
    assert is_empty(client)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [([], {}), ([], {"input": "hi"}), (["hi"], {}), ([None], {}), ([{"agent_id": "a"}], {})],
)
def test_what_is_no_request_is_refused_before_anything_is_written(
    run_agent: AgentTask, client: Client, args: list[Any], kwargs: dict[str, Any]
) -> None:
    """The error shows the form of a request."""
    with pytest.raises(RequestInvalid) as error:
        run_agent.apply_async(args=args, kwargs=kwargs)

    assert error.value.hint
    assert is_empty(client)


@pytest.mark.parametrize(
    "options",
    [
        {"serializer": "pickle"},
        {"compression": "gzip"},
        {"shadow": "x"},
        {"time_limit": 5},
        {"stamped_headers": ["a"]},
        {"ignore_result": False},
        {"routing_key": "a"},
    ],
)
def test_an_option_that_would_be_ignored_is_refused_by_name(
    run_agent: AgentTask, client: Client, options: dict[str, Any]
) -> None:
    """No argument of a caller is ignored silently."""
    (name,) = options
    with pytest.raises(RequestInvalid, match=name):
        run_agent.apply_async(args=[FIELDS], **options)

    assert is_empty(client)


def test_the_task_id_is_the_run_id(run_agent: AgentTask, client: Client) -> None:
    """Alone it becomes the run_id. Together with another run_id it is rejected."""
    by_dict = run_agent.apply_async(args=[FIELDS], task_id="r1")
    by_model = run_agent.apply_async(args=[RunRequest(**FIELDS)], task_id="r2")
    alike = run_agent.apply_async(args=[{**FIELDS, "run_id": "r3"}], task_id="r3")
    for request in ({**FIELDS, "run_id": "r5"}, RunRequest(**FIELDS, run_id="r5")):
        with pytest.raises(RequestInvalid, match="are different"):
            run_agent.apply_async(args=[request], task_id="r4")

    assert [by_dict.id, by_model.id, alike.id] == ["r1", "r2", "r3"]
    for handle in (by_dict, by_model, alike):
        assert handle.record().request.run_id == handle.id  # type: ignore[union-attr]
        handle.cancel()


def in_a_minute() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=60)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"countdown": 60},
        lambda: {"eta": in_a_minute()},
        lambda: {"eta": in_a_minute().replace(tzinfo=None)},
        lambda: {"eta": in_a_minute().isoformat()},
    ],
    ids=["countdown", "aware", "naive", "text"],
)
def test_countdown_and_eta_schedule_a_run(
    run_agent: AgentTask, options: Callable[[], dict[str, Any]]
) -> None:
    """The run is due then, by the store's clock; a naive eta is in the app's time zone (UTC)."""
    handle = run_agent.apply_async(args=[FIELDS], **options())

    record = handle.record()
    assert record.due_ms is not None
    assert record.created_ms is not None
    assert 0 < record.due_ms - record.created_ms <= 60_000
    handle.cancel()


@pytest.mark.parametrize(
    "when", [{"countdown": "soon"}, {"eta": "soon"}, {"countdown": 1, "eta": "2026-01-01"}]
)
def test_a_time_that_is_none_is_refused(run_agent: AgentTask, client: Client, when: dict[str, Any]) -> None:
    """So are two of them."""
    with pytest.raises(RequestInvalid, match=r"countdown|eta"):
        run_agent.apply_async(args=[FIELDS], **when)

    assert is_empty(client)


def test_a_time_in_the_past_is_now(run_agent: AgentTask) -> None:
    """A late scheduler does not lose its run."""
    handle = run_agent.apply_async(args=[FIELDS], countdown=-5)

    assert handle.record().state is RunState.QUEUED
    handle.cancel()


def test_a_signature_submits_as_the_task_does(run_agent: AgentTask) -> None:
    """`.s(request).delay()` and a signature's own options end in the same place."""
    handle = run_agent.s(FIELDS).set(queue="slow").delay()

    assert isinstance(handle, RunHandle)
    assert handle.record().queue == "slow"
    handle.cancel()


def test_a_worker_apps_task_submits_as_the_producers_does(settings: Settings) -> None:
    """`AgentTask` is also the base of the worker's task, which submits through its app."""

    def body(self: AgentTask, request: Any) -> None: ...

    app = make_app(settings)
    task = app.task(body, name="tasks.run_agent", base=AgentTask, bind=True, shared=False)

    handle = task.delay(FIELDS)

    assert handle.record().state is RunState.QUEUED
    handle.cancel()
    client_of(app).close()
    app.close()


def test_celery_beat_submits_runs(run_agent: AgentTask, client: Client) -> None:
    """A schedule's entry is a submission like any other; each time it is a new run."""
    scheduler = Scheduler(client.app, lazy=True)
    entry = scheduler.Entry(name="hourly", task=run_agent.name, args=(FIELDS,), schedule=3600, app=client.app)

    first, second = (scheduler.apply_async(entry, producer=client.app.amqp.Producer) for _ in range(2))

    assert first.id != second.id
    for handle in (first, second):
        assert isinstance(handle, RunHandle)
        handle.cancel()


def test_async_result_of_the_task_is_the_runs_handle(run_agent: AgentTask, client: Client) -> None:
    """`run_agent.AsyncResult(run_id)`, `Client.handle(run_id)` and `RunHandle(run_id)` are the same."""
    assert run_agent.AsyncResult("r1") == client.handle("r1") == RunHandle("r1", client=client)


def test_a_producers_task_does_not_run_anything(run_agent: AgentTask) -> None:
    """Called as a function, it raises an error that says where runs are executed."""
    with pytest.raises(ConfigError, match="can submit runs, but cannot execute") as error:
        run_agent(FIELDS)

    assert "celery -A tasks worker" in str(error.value)


def test_run_agent_of_the_front_door_submits_where_the_environment_says(
    redis_url: str, client: Client
) -> None:
    """It needs only the settings of Redis, no agents file and no app. The current Celery app does not
    change."""
    program = """
import celery
before = celery.current_app._get_current_object()
from openagents_worker import run_agent, RunHandle
handle = run_agent.delay({"agent_id": "assistant", "session_id": "s1", "input_text": "hi", "run_id": "r1"})
assert run_agent.name == "tasks.run_agent"
assert RunHandle("r1").state == run_agent.AsyncResult("r1").state == "PENDING"
assert celery.current_app._get_current_object() is before
assert "tasks.run_agent" not in before.tasks
print(handle.id)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "OPENAGENTS_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert (done.stdout, done.stderr) == ("r1\n", "")
    assert client.record("r1").state is RunState.QUEUED
    client.cancel("r1")
