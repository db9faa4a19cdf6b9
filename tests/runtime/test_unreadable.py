"""A claimed run whose stored data cannot be read fails with a code, instead of being claimed for ever."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.models import RunState
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store.sessions import aread_session
from tests.runtime.test_endings import acting, error_of
from tests.support.runner import Process, agent, due, process

DEEP = "[" * 100_000
NOT_JSON = {
    "nothing": "x",
    "a torn text": '{"a":',
    "endless nesting": DEEP,
    "an object that is endlessly nested": '{"a":' * 100_000,
    "an integer of many digits": "1" * 5_000,
    "NaN": "NaN",
    "half of a pair": '"\\ud800',
    "bytes": b'{"a":"\xff',
}
NOT_OURS = {
    "a number": "7",
    "a list": "[]",
    "null": "null",
    "an empty object": "{}",
    "an object of others": '{"who":"me"}',
    "a nesting that pydantic does not read": '{"metadata":{"x":' + "[" * 220 + "]" * 220 + "}}",
}
REQUESTS = NOT_JSON | NOT_OURS
RECORD = '{"call":"c","v":2,"kind":"tool","name":"x"'
RECORDS = (
    NOT_JSON
    | NOT_OURS
    | {
        "a record without its outcome": RECORD + "}",
        "an outcome that is a text": RECORD + ',"outcome":"ok"}',
        "an error that is a text": RECORD + ',"outcome":{"error":"no"}}',
        "usage of others": RECORD + ',"outcome":{"ok":1},"usage":{"llm_calls":"x"}}',
        "a format that is a text": '{"call":"c","v":"two","kind":"tool","name":"x","outcome":{"ok":1}}',
    }
)


async def next_run_completes(p: Process, agent_id: str) -> None:
    """The worker executes the next run, also in the same session."""
    record = await p.run("next", agent_id=agent_id)
    assert record.state is RunState.COMPLETED, record.result


async def ended_unreadable(p: Process, run_id: str = "r1") -> None:
    record = await p.record(run_id)
    assert record.state is RunState.FAILED
    assert error_of(record)[0] == "record.unreadable"
    assert record.recoveries == 0
    names = await p.event_names(run_id)
    assert names[-2:] == ["run.failed", "session.run.completed"]


@pytest.mark.parametrize("what", list(REQUESTS))
async def test_an_unreadable_request_fails_its_run(redis_url: str, what: str) -> None:
    """The producer gets its result, and its session continues."""
    async with process(redis_url, agent()) as p:
        await p.submit()
        await p.store.redis.hset(p.store.keys("run", "r1"), "request", REQUESTS[what])

        attempt_result = await p.execute()

        assert attempt_result.kind is AttemptOutcome.FINISHED
        assert (await p.record()).request is None
        await ended_unreadable(p)
        await next_run_completes(p, "a")


async def test_a_request_with_a_field_of_a_newer_version_is_left_to_others(redis_url: str) -> None:
    """During an upgrade, a worker of the version that wrote it executes the run."""
    async with process(redis_url, agent()) as p:
        await p.submit()
        key = p.store.keys("run", "r1")
        written = await p.store.redis.hget(key, "request")
        await p.store.redis.hset(key, "request", f'{{"mood":"good",{written[1:]}')

        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, "run.other_format")
        await p.store.redis.hset(key, "request", written)
        await due(p)
        await p.execute()
        assert (await p.record()).state is RunState.COMPLETED


@pytest.mark.share(of=3)
@pytest.mark.parametrize("what", list(RECORDS))
@pytest.mark.parametrize("position", [0, 1])
async def test_an_unreadable_journal_fails_its_run(redis_url: str, what: str, position: int) -> None:
    """Nothing is executed with an incomplete journal."""
    async with process(redis_url, acting("CallsTool", "ToolSays", code="tool.unavailable"), agent("b")) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        journal = p.store.keys("journal", "r1")
        if position == 1:
            await p.store.redis.rpush(journal, RECORDS[what])
        else:
            await p.store.redis.lset(journal, 0, RECORDS[what])
        await due(p)

        assert (await p.execute()).kind is AttemptOutcome.FINISHED

        await ended_unreadable(p)
        await next_run_completes(p, "b")


@pytest.mark.parametrize("what", list(NOT_JSON))
@pytest.mark.parametrize("kind", ["session_state", "transcript", "artifacts"])
async def test_an_unreadable_session_fails_the_run_that_reads_it(
    redis_url: str, what: str, kind: str
) -> None:
    """Neither the worker nor the session is affected:

    once the session is repaired, its next run completes.
    """
    async with process(redis_url, agent()) as p:
        assert (await p.run("before")).state is RunState.COMPLETED
        key, redis = p.store.keys(kind, "s1"), p.store.redis
        if kind == "session_state":
            await redis.hset(key, "plan", NOT_JSON[what])
        else:
            await redis.rpush(key, NOT_JSON[what])
        await p.run()

        await ended_unreadable(p)
        await (redis.hdel(key, "plan") if kind == "session_state" else redis.rpop(key))
        await next_run_completes(p, "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("usage", "attempt", "retries", "recoveries", "active_ms")
        for value in ("x", "1" * 5_000, "-1", "-inf", "nan", "1.5", DEEP)
    ],
)
async def test_a_counter_that_is_not_a_number_counts_as_zero(redis_url: str, field: str, value: str) -> None:
    """It does not prevent the execution of the run. The scripts treat it in the same way."""
    async with process(redis_url, agent()) as p:
        await p.submit()
        await p.store.redis.hset(p.store.keys("run", "r1"), field, value)

        attempt_result = await p.execute()

        assert (attempt_result.kind, str(attempt_result.stop_reason)) == (
            AttemptOutcome.FINISHED,
            "completed",
        )


async def test_an_unreadable_result_is_reported_as_a_failure(redis_url: str) -> None:
    """Celery is notified of the end of a run whose result was overwritten."""
    async with process(redis_url, agent()) as p:
        await p.submit(tell=True)
        await p.execute()
        await p.store.redis.hset(p.store.keys("run", "r1"), "result", '{"run_id":')

        attempt_result = await p.execute()

    assert attempt_result.kind is AttemptOutcome.FINISHED
    assert attempt_result.error is not None
    assert attempt_result.error.code == "record.unreadable"


async def test_data_of_older_versions_is_still_read(redis_url: str) -> None:
    """150 levels and long integers, in requests, journals and sessions, are read unchanged."""
    value: Any = 10**40
    for _ in range(140):
        value = [value]
    text = str(value).replace(" ", "")
    async with process(redis_url, agent()) as p:
        await p.submit()
        key = p.store.keys("run", "r1")
        written = await p.store.redis.hget(key, "request")
        older = written.replace('"metadata":{}', f'"metadata":{{"x":{text}}}')
        assert older != written
        await p.store.redis.hset(key, "request", older)
        await p.store.redis.hset(p.store.keys("session_state", "s1"), "plan", text)

        await p.execute()

        record, session = await p.record(), await aread_session(p.store, "s1")
        assert record.state is RunState.COMPLETED, record.result
        assert record.request is not None
        assert record.request.metadata["x"] == value
        assert session.state["plan"] == value
        assert await p.store.redis.hget(p.store.keys("session_state", "s1"), "plan") == text
